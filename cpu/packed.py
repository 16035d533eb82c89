"""The few-bit weights of GGUF files as a CPU multiplies them: the file's own numbers.

GGUF shares a scale s, and in some types a minimum m, among a group of 16 or 32 inputs of one
output: w = s (q - offset) + m. In W transposed, [K, N], 16 or 32 rows share one row of scales:

    y[n] = sum over groups g of s[g, n] * (sum over kept k in g of x[k] (q[k, n] - offset))
                              + m[g, n] * (sum over kept k in g of x[k])

So a row of q is still skipped with its x[k]. No weight is rounded: q, s and m are those of the
file. Types whose scale is a product (Q4_K, Q5_K, Q6_K) have it in float16, which moves a weight by
2^-12 of itself at most; the step from one q to the next is 30 times that or more.

Appendix B of step.c sums q in integers of 16 bits, several of one word with one multiplication
each, and says how the words hold them. Nothing but step.c reads these weights: without a compiler,
load as int8.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cpu.compiler import library
from cpu.matrix import PIECE, Matrix, describe_packed, multiply_pieces, unpack
from model import Linear

COLUMNS = {4: 64, 5: 48, 6: 128, 8: 32}  # of a block


@dataclass
class Groups:
    """What belongs to a few-bit tensor [N, K] besides its floats.

    scale, minimum: float32 [N, K / group]; minimum may be None
    """

    bits: int
    offset: int
    scale: torch.Tensor
    minimum: torch.Tensor | None = None


def pack(fields):
    """q as int32 [K, blocks, fields, 16] -> words int32 [K, blocks, words, 16], as step.c has
    them."""
    f, n = fields.unbind(2), fields.shape[2]
    if n == 8:  # of 6 bits; the last two are spread over the upper four bits of the words
        words = [f[0] | f[1] << 6 | (f[6] & 15) << 12, f[2] | f[3] << 6 | (f[7] & 15) << 12,
                 f[4] | f[5] << 6 | f[6] >> 4 << 12 | f[7] >> 4 << 14]
    else:
        words = [sum(f[i] << 16 // n * i for i in range(n))]
    return torch.stack(words, 2)


class Packed:
    """A few-bit matrix W [N, K], transposed.

    words: int16 [K, words of a row], as appendix B of step.c describes them
    scale, minimum: float16 [K / group, columns], in units of `unit`; minimum may be None
    """

    def __init__(self, weight, groups, dtype=torch.float32):
        """weight: float32 [N, K], exactly what q and `groups` stand for
        dtype: of an embedding's rows
        """
        self.dtype = dtype
        self.bits, self.offset = groups.bits, groups.offset
        self.n, k = weight.shape
        self.group = k // groups.scale.shape[1]
        self.block = COLUMNS[self.bits]
        self.columns = -(-self.n // self.block) * self.block
        per_block = 48 if self.bits == 6 else 16
        self.words = torch.empty(k, self.columns // self.block * per_block, dtype=torch.int16)
        step = max(1, PIECE // k // self.block) * self.block
        for i in range(0, self.n, step):
            part = slice(i, min(i + step, self.n))
            scale = groups.scale[part, :, None]
            q = weight[part].unflatten(1, (-1, self.group))
            if groups.minimum is not None:
                q = q - groups.minimum[part, :, None]
            q = torch.where(scale == 0, 0, q / scale).round_().flatten(1) + self.offset
            q = F.pad(q.clamp_(0, (1 << self.bits) - 1), (0, 0, 0, -len(q) % self.block))
            fields = q.to(torch.int32).T.unflatten(1, (-1, self.block // 16, 16))
            words = pack(fields.contiguous()).flatten(1)
            at = i // self.block * per_block
            self.words[:, at:at + words.shape[1]] = words.to(torch.int16)
        # The largest scale or minimum becomes 2^14 to 2^15, so that none that matters is denormal.
        both = [x for x in (groups.scale, groups.minimum) if x is not None]
        _, exponent = torch.frexp(max(x.abs().max() for x in both))
        self.unit = 2.0 ** (exponent.item() - 15)
        self.scale, self.minimum = (None if x is None else self.halves(x)
                                    for x in (groups.scale, groups.minimum))

    def halves(self, x):
        """Scales [N, groups] -> float16 [groups, columns] in units of `unit`."""
        return F.pad((x / self.unit).half(), (0, 0, 0, self.columns - self.n)).T.contiguous()

    def weight(self, first=0, end=None):
        """Columns first, where a block begins, to end - 1 of W transposed: float32 [K, columns]."""
        end, k = end or self.n, len(self.words)
        matrix = Matrix(packed=describe_packed([self]), k=k)
        blocks = -(-(end - first) // self.block)
        return unpack(matrix, 0, first, end, torch.empty(k, blocks * self.block))

    def __getitem__(self, tokens):
        """Rows of W, [T, K]: an embedding's."""
        rows = [self.weight(i // self.block * self.block, i + 1)[:, -1] for i in tokens.tolist()]
        return torch.stack(rows).to(self.dtype)


class PackedLinear(Linear):
    """A `Linear` of few-bit weights on a CPU; each projection may have another type."""

    def allocate(self, device):
        library()  # or raise NoCompiler
        self.parts = [None] * len(self.widths)  # Packed

    def load_weight(self, i, weight, groups):
        """Store the weight [out_features, in_features] of projection i and its `Groups`."""
        self.parts[i] = Packed(weight, groups, self.dtype)

    @property
    def w_t(self):
        """All of W transposed as floats, made anew: for what is not in a hurry."""
        return self.weight(0, self.ends[-1])

    def weight(self, start, end):
        """Columns start ... end - 1, some whole projections, as floats [K, end - start]."""
        parts = [part for part, first in zip(self.parts, self.starts) if start <= first < end]
        return torch.cat([part.weight() for part in parts], 1).to(self.dtype)

    def __call__(self, x):
        return multiply_pieces(x, self)

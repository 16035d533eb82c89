"""int8 and 4-bit weights, whose gain multiplies with sparsity's, and the command that writes a
folder of them.

Decoding waits for weights to arrive from memory, so a weight of fewer bits is read sooner. Sparsity
leaves half of those unread: the two gains multiply. Activations stay as they are, and so do the
thresholds on them. Norms, biases and the embedding keep their precision.

    python quantize.py --out /tmp/smollm2-int8
    python quantize.py --quantize int4 --out /tmp/smollm2-int4
    python quantize.py --model meta-llama/Llama-3.2-1B-Instruct --out llama-3.2-1b-int8
"""

import runpy

import torch

from cpu.matrix import multiply_pieces
from model import Linear, cpu_dtype

PIECE = 1 << 20  # weights quantized, or turned to floats on a CPU, at a time
FLOATS = 1 << 24  # weights turned to floats at a time on a GPU, for prefill
GROUP = 32  # columns whose 4-bit weights share a scale and a minimum
GROUP_BYTES = GROUP // 2 + 4  # numbers, then scale and minimum
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # of a group's range, around its middle


# ---- int8: half the bytes of bfloat16, and at 50% sparsity a quarter ---------------------------
#
# For one output channel w, a row of W [N, K]:
#
#     scale = max(|w|) / 127                one float32 for the whole row
#     q     = round(w / scale)              integers from -127 to 127, one byte each
#     w     ~ q * scale                     off by at most scale / 2
#     y     = sum of x[k] * w[k]  ~  scale * (sum of x[k] * q[k])
#
# The scale does not depend on k, so it is applied once, to the finished sum. Whatever adds up rows
# of numbers adds up rows of integers just as well.
#
# The largest weight sets the scale. A smaller scale, which clips it and rounds the others more
# finely, did not help: KL divergence from the unquantized SmolLM2-135M 0.0039, not 0.0037.

def quantize_tensor(weight, name="weight"):
    """A float matrix [N, K] -> (int8 [N, K], scales float32 [N]), rounded to nearest.

    Raises ValueError, naming the tensor, if a weight is infinite or NaN.
    """
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], device=weight.device)
    rows = max(1, PIECE // weight.shape[1])
    for w, q_rows, scale_rows in zip(weight.split(rows), q.split(rows), scale.split(rows)):
        w = w.float()
        torch.div(w.abs().amax(1), 127, out=scale_rows)
        scale_rows.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros: 0 / tiny is 0
        q_rows.copy_((w / scale_rows[:, None]).round_())
    require_finite(scale, name)  # the largest of numbers with a NaN is NaN
    return q, scale


def require_finite(scales, name):
    """Raise ValueError if the scales of a tensor tell that its weights were not finite."""
    if not scales.isfinite().all():
        raise ValueError(f"tensor {name} holds weights that are infinite, NaN or immense, which "
                         "cannot be quantized; get a sound checkpoint")


def multiply_on_gpu(x, linear):
    """x [T, K] times a quantized Linear. All columns as floats could be the largest thing in
    memory, so some become floats at a time."""
    step, n = max(1, FLOATS // (linear.in_features * GROUP)) * GROUP, linear.ends[-1]
    y = torch.cat([x @ linear.weight(i, min(i + step, n)) for i in range(0, n, step)], dim=-1)
    return y if linear.bias is None else y + linear.bias


class Int8Linear(Linear):
    """A `Linear` with int8 weights: y = (x @ w_t) * scale + bias. w_t is int8 [K, N]."""

    def allocate(self, device):
        super().allocate(device, torch.int8)
        self.scale = torch.empty(self.ends[-1], device=device)

    def load_weight(self, i, weight):
        """Store projection i's weight [out_features, in_features]: floats; or int8, whose scale
        `load_scale` stores."""
        start, end = self.starts[i], self.ends[i]
        if weight.dtype != torch.int8:
            weight, self.scale[start:end] = quantize_tensor(weight)
        self.w_t[:, start:end] = weight.T

    def load_scale(self, i, scale):
        self.scale[self.starts[i]:self.ends[i]] = scale

    def weight(self, start, end):
        """Columns start ... end - 1 as the floats they stand for, [K, end - start]."""
        q = self.w_t[:, start:end]
        return torch.mul(q, self.scale[start:end], out=torch.empty_like(q, dtype=self.dtype))

    def __call__(self, x):
        if x.device.type != "cpu":
            return multiply_on_gpu(x, self)
        # A piece is small enough to stay in the cache from one operation to the next.
        pieces = self.w_t.split(max(1, PIECE // self.in_features), dim=1)
        dtype = cpu_dtype(x.dtype)  # integers up to 127 are exact in all of them
        wide = x.to(dtype)
        y = torch.cat([wide @ piece.to(dtype) for piece in pieces], dim=-1)
        y = (y * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


# ---- 4 bits: 5 bits a weight, scales included --------------------------------------------------
#
# A group is 32 output columns of one input channel. So it lies inside one row of w_t, and a
# dropped row takes its scales with it. Each group stores a scale s and a minimum m in bfloat16 and
# 32 numbers q from 0 to 15; a weight is s * q + m.
#
# Rounding searches s and m for the least squared error: it starts from several ranges, the widest
# from the smallest to the largest weight, rounds, fits s and m to the rounded numbers by least
# squares, rounds again, and keeps the best. Where a projection's columns are not a multiple of 32,
# the matrix is int8; the LM head always is.

def quantize_int4(weight, name="weight"):
    """A float matrix [N, K], N a multiple of 32 -> its groups, uint8 [N / 32, K, 20].

    The first 16 bytes of a group hold its numbers: byte j holds column j in its low four bits and
    column j + 16 in its high four. The last 4 hold scale and minimum in bfloat16. Raises
    ValueError, naming the tensor, if a weight is infinite, NaN or immense.
    """
    n, k = weight.shape
    groups = torch.empty(n // GROUP, k, GROUP_BYTES, dtype=torch.uint8, device=weight.device)
    step = max(1, PIECE // n)
    for w, out in zip(weight.split(step, dim=1), groups.split(step, dim=1)):
        q, scales = search(w.float().unflatten(0, (-1, GROUP)).mT.contiguous())
        require_finite(scales, name)
        low, high = q.to(torch.uint8).chunk(2, dim=-1)
        out[..., :GROUP // 2] = low | high << 4
        out[..., GROUP // 2:] = scales.view(torch.uint8)
    return groups


def split_groups(groups):
    """What `quantize_int4` returns -> (w_t uint8 [K, N / 2], scale and minimum of each group
    bfloat16 [K, N / 32, 2]), as the kernel reads them."""
    w_t, scale = groups.transpose(0, 1).split((GROUP // 2, 4), dim=-1)
    return w_t.flatten(1), scale.view(torch.bfloat16)


def search(w):
    """Groups of weights [..., 32] -> (q [..., 32], scale and minimum bfloat16 [..., 2])."""
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best = None
    for share in SHARES:
        scale = (high - low) * share / 15
        minimum = (high + low) / 2 - 7.5 * scale
        q = nearest(w, scale, minimum)
        # The line through (q, w) with the least squared error.
        q_mean, w_mean = q.mean(-1, keepdim=True), w.mean(-1, keepdim=True)
        spread = (q - q_mean).square().sum(-1, keepdim=True)
        slope = ((q - q_mean) * (w - w_mean)).sum(-1, keepdim=True) / spread
        slope = torch.where(spread > 0, slope, 0)
        scale = slope.bfloat16().float()
        # The minimum rounds too; what is lost there moves the whole group by less than 1 / 256.
        minimum = (w_mean - scale * q_mean).bfloat16().float()
        q = nearest(w, scale, minimum)
        error = (q * scale + minimum - w).square().sum(-1, keepdim=True)
        found = q, torch.cat((scale, minimum), -1), error
        if best is None:
            best = found
        else:
            better = error < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best))
    return best[0], best[1].bfloat16()


def nearest(w, scale, minimum):
    """The numbers from 0 to 15 whose scale * q + minimum are closest to w."""
    tiny = torch.finfo(torch.float32).tiny  # a group of equal weights: 0 / tiny is 0
    return ((w - minimum) / scale.clamp(min=tiny)).round().clamp(0, 15)


def dequantize(w_t, scale, dtype=torch.float32):
    """What `split_groups` returns -> the floats that it stands for, [K, N]."""
    q = w_t.unflatten(1, (-1, GROUP // 2))
    q = torch.cat((q & 15, q >> 4), -1)
    scale, minimum = scale.float().split(1, -1)
    return torch.addcmul(minimum, q.float(), scale).to(dtype).flatten(1)


def can_be_int4(site, widths):
    """Whether the matrices of a site, with these out_features, become int4; else they are int8."""
    return site != "lm_head" and not any(width % GROUP for width in widths)


def int4_linear(layer, site, in_features, widths, has_bias, dtype, device):
    """A matrix for `Model`: int4 where that is possible, else int8."""
    kind = Int4Linear if can_be_int4(site, widths) else Int8Linear
    return kind(layer, site, in_features, widths, has_bias, dtype, device)


class Int4Linear(Linear):
    """A `Linear` with int4 weights: w_t is uint8 [K, N / 2], scale bfloat16 [K, N / 32, 2]."""

    def allocate(self, device):
        k, n = self.in_features, self.ends[-1]
        self.w_t = torch.empty(k, n // 2, dtype=torch.uint8, device=device)
        self.scale = torch.empty(k, n // GROUP, 2, dtype=torch.bfloat16, device=device)

    def load_weight(self, i, weight):
        """Store the weight of projection i: floats, or what `quantize_int4` makes of them."""
        if weight.dtype != torch.uint8:
            weight = quantize_int4(weight)
        start, end = self.starts[i], self.ends[i]
        w_t, scale = split_groups(weight)
        self.w_t[:, start // 2:end // 2] = w_t
        self.scale[:, start // GROUP:end // GROUP] = scale

    def weight(self, start, end):
        """Columns start ... end - 1, multiples of 32, as the floats they stand for."""
        scale = self.scale[:, start // GROUP:end // GROUP]
        return dequantize(self.w_t[:, start // 2:end // 2], scale, self.dtype)

    def __call__(self, x):
        return (multiply_pieces if x.device.type == "cpu" else multiply_on_gpu)(x, self)


if __name__ == "__main__":  # this command reads and writes checkpoints, which use this module
    runpy.run_module("cli.quantize_folder", run_name="__main__")

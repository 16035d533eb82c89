"""int8 weights: half the bytes of bfloat16, and at 50% sparsity a quarter.

Decoding waits for weights to arrive from memory, so a weight of fewer bits is read sooner. Sparsity
leaves half of those unread: the two gains multiply. For one output channel w, a row of W [N, K]:

    scale = max(|w|) / 127                one float32 for the whole row
    q     = round(w / scale)              integers from -127 to 127, one byte each
    w     ~ q * scale                     off by at most scale / 2
    y     = sum of x[k] * w[k]  ~  scale * (sum of x[k] * q[k])

The scale does not depend on k, so it is applied once, to the finished sum. Whatever adds up rows
of numbers adds up rows of integers just as well. Activations stay as they are, and so do the
thresholds on them. Norms, biases and the embedding keep their precision.

The largest weight sets the scale. A smaller scale would clip it and round the others more finely.
Chosen by squared error, plain or weighted by the inputs' mean squares, it did not help: KL
divergence from the unquantized SmolLM2-135M 0.0039 and 0.0040, against 0.0037 as above
(WikiText-2).
"""

import torch

from cpu_gemv import ROW_END, empty_packed, pack, unpack
from model import Linear

PIECE = 1 << 20  # weights quantized, or turned to floats on a CPU, at a time
FLOATS = 1 << 24  # weights turned to floats at a time on a GPU, for prefill


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
    if not scale.isfinite().all():  # the largest of numbers with a NaN is NaN
        raise ValueError(f"tensor {name} holds infinite or NaN weights, which cannot be quantized; "
                         "get a sound checkpoint")
    return q, scale


class Int8Linear(Linear):
    """A `Linear` with int8 weights: y = (x @ w_t) * scale + bias.

    w_t is int8 [K, N] on a GPU. On a CPU it is packed as the fast product there wants it
    (cpu_gemv.py).
    """

    def allocate(self, device):
        n = self.ends[-1]
        self.packed = torch.device(device).type == "cpu"
        if self.packed:
            self.w_t = empty_packed(self.in_features, self.ends, narrow=self.site == "lm_head")
        else:
            self.w_t = torch.empty(self.in_features, n, dtype=torch.int8, device=device)
        self.scale = torch.empty(n, device=device)

    def load_weight(self, i, weight):
        """Store projection i's weight [out_features, in_features], floats, or int8 with
        `load_scale`."""
        start, end = self.starts[i], self.ends[i]
        if weight.dtype != torch.int8:
            weight, self.scale[start:end] = quantize_tensor(weight)
        if self.packed:
            pack(self.w_t, start, weight)
        else:
            self.w_t[:, start:end] = weight.T

    def load_scale(self, i, scale):
        self.scale[self.starts[i]:self.ends[i]] = scale

    def weight(self, start, end):
        """Columns start ... end - 1 as the floats they stand for, [K, end - start]."""
        q = unpack(self.w_t, start, end) if self.packed else self.w_t[:, start:end]
        w = torch.empty(q.shape, dtype=self.dtype, device=q.device)
        return torch.mul(q, self.scale[start:end], out=w)

    def __call__(self, x):
        if self.packed:
            # Integers up to 127 are exact in any dtype, but sums of them overflow float16.
            dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
            pieces = [x.to(dtype) @ q for q in self.integers(dtype)]
            y = (torch.cat(pieces, dim=-1) * self.scale).to(x.dtype)
        else:  # all columns as floats could be the largest thing in memory
            n, step = self.ends[-1], max(1, FLOATS // self.in_features)
            y = torch.cat([x @ self.weight(start, min(start + step, n))
                           for start in range(0, n, step)], dim=-1)
        return y if self.bias is None else y + self.bias

    def integers(self, dtype):
        """The packed columns, unscaled, a piece after the other.

        A piece is small enough to stay in the cache from one operation to the next.
        """
        width, step = self.w_t.shape[2] - ROW_END, max(1, PIECE // self.in_features)
        for block in self.w_t:
            for q in block[:, :width].split(step, dim=1):
                yield (q ^ 128).view(torch.int8).to(dtype)

"""Which rows of the LM head can hold the likeliest tokens: a proof that reads half of its bytes.

The LM head is the largest matrix of a step, and dense. But only its few largest logits matter.
Each row w of W [V, K] is also stored as integers q with a scale s (quantize.py). The hidden state
h becomes integers v of 16 bits with a scale t. By Cauchy and Schwarz, in exact arithmetic,

    |w . h - s t (q . v)|  <=  |w - s q| |h| + |s q| |h - t v|      (|x|: the Euclidean norm)

and both norms of a row are known beforehand. So reading q, half of a 16-bit W, gives every logit a
lower and an upper bound. Where k tokens suffice, at least k logits reach the k-th largest lower
bound; a row whose upper bound is smaller than that holds none of them. Only the other rows are
read: a handful of a hundred thousand. Their logits have the bits that reading all of W gives, so
the choice is the same, for every input, ties included.

**Rounding.** q . v is exact: integers of 32 bits, with t so large that it cannot overflow. Any
order of a float32 sum is off by at most about K 2**-24 |w| |h|; the h of two kernels, which each
take its RMSNorm, differ by no more. The radius of the bounds allows both, another 2**-19 |w| |h|
for the rounding of h, t, s and the norms, 1/256 of itself, and 1e-28 for numbers so small that
float32 loses them; |w - s q| counts weights below 2**-126 as lost. Both bounds are rounded to the
logits' dtype before they are compared. Rounding keeps order, so a row that is left out is smaller
than the k-th largest after rounding, too, and cannot tie with it. NaN, infinities and logits near
the end of the dtype's range prove nothing: then all rows are read.

gpu/head.py and cpu/step.c compute `bounds` and `likely_rows` fast. This file needs only torch.
"""

from dataclasses import dataclass

import torch

LARGEST_V = 32512  # 127 * 256: high and low byte of an integer up to this are from -128 to 127
LARGEST_K = 16384
MOST_TOKENS = 128  # to choose among; for more of them, too many rows would remain
LEAST_WEIGHTS = 1 << 20  # of a head for which all this pays
PIECE = 1 << 22  # weights rounded at a time


@dataclass
class Certificate:
    """What the bounds need of W [V, K]: its rounded rows, and three numbers for each."""

    q: torch.Tensor  # int8 [V, K]
    rows: torch.Tensor  # float32 [3, V]: scale s, |w - s q| and |w|, the norms rounded up

    @property
    def nbytes(self):
        return self.q.nbytes + self.rows.nbytes


def certify(w):
    """W [V, K] in floats, K a multiple of 4 up to LARGEST_K -> its Certificate.

    A row that holds an infinity or a NaN gets norms that prove nothing.
    """
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    rows = torch.empty(3, w.shape[0], device=w.device)
    n, tiny = max(1, PIECE // w.shape[1]), torch.finfo(torch.float32).tiny
    flushed = tiny * w.shape[1] ** 0.5  # where denormal weights count as zeros
    for w_piece, q_piece, (scale, error, norm) in zip(w.split(n), q.split(n),
                                                      rows.split(n, dim=1)):
        w_piece = w_piece.float()
        torch.div(w_piece.abs().amax(1), 127, out=scale)
        scale.clamp_(min=tiny)  # a row of zeros: 0 / tiny is 0
        # In units of the scale, so that no square can overflow or vanish.
        exact = w_piece / scale[:, None]
        rounded = exact.round()
        # `exact` itself is rounded: by 2**-24 of at most 127 each.
        slack = 127 * 2.0 ** -23 * w.shape[1] ** 0.5
        error.copy_(((exact - rounded).norm(dim=1) + slack) * scale * (1 + 2 ** -10) + flushed)
        norm.copy_(rounded.norm(dim=1) * scale * (1 + 2 ** -10) + error)
        q_piece.copy_(rounded.nan_to_num_(0, 0, 0))
    return Certificate(q, rows)


def limits(dtype):
    """(largest bound that proves something, logit of a row that is not read) for logits of dtype.

    The second is smaller than the largest logits, also after a repetition penalty of 100.
    """
    return (2.0 ** 14, -(2.0 ** 15)) if dtype == torch.float16 else (2.0 ** 100, -(2.0 ** 110))


def bounds(h, certificate):
    """Hidden state h [K], float32 -> (lower, upper) of all logits, float32 [V], in plain PyTorch.

    A NaN proves nothing.
    """
    k = len(h)
    t = h.abs().amax() / LARGEST_V
    grown = ((h / t).norm() * (127 * k ** 0.5 / 2 ** 30)).clamp_(min=1)
    t = t * grown
    v = (h / t + 0.5).floor_()
    norm, rest = (h / t).norm(), (h / t - v).norm()
    rest += norm * (k * 2.0 ** -23 + 2.0 ** -19)
    scale, error, w_norm = certificate.rows
    y = torch.cat([q.double() @ v.double() for q in certificate.q.split(max(1, PIECE // k))])
    y = y.float() * (t * scale)
    radius = t * (error * norm + w_norm * rest) * (1 + 2.0 ** -8) + 1e-28
    return y - radius, y + radius


def likely_rows(lower, upper, top, dtype):
    """`bounds` -> which logits of dtype can be among the `top` largest, bool [V]."""
    lower, upper = lower.to(dtype), upper.to(dtype)
    limit, _ = limits(dtype)
    if not ((lower > -limit) & (upper < limit)).all():
        return torch.ones_like(lower, dtype=torch.bool)
    return upper >= lower.topk(top).values[-1]


def certificate_for(linear, top):
    """The Certificate of an LM head in floats, made once, to find the `top` largest of its logits.

    None where bounds do not help: too many logits matter, or all (0), or the head is small.
    """
    v, k = linear.ends[-1], linear.in_features
    fits = linear.scale is None and k % 4 == 0 and k <= LARGEST_K and v * k >= LEAST_WEIGHTS
    if not (fits and 0 < top <= min(MOST_TOKENS, v)):
        return None
    if not hasattr(linear, "certificate"):  # made once for a model
        linear.certificate = certify(linear.w_t.T)
    return linear.certificate


def logits_needed(temperature, top_k, penalty):
    """How many of the largest logits a choice depends on (see `sample`), 0 for all."""
    return 0 if penalty < 1 else 1 if temperature == 0 else top_k


def head_saving(linear, certificate, rows):
    """Bytes fewer that a step reads of an LM head if it reads a Certificate and these rows; 0
    without one."""
    if certificate is None:
        return 0
    return linear.w_t.nbytes * (1 - rows / linear.ends[-1]) - certificate.nbytes

"""The LM head of a decode step: bounds of all logits, then the rows that can hold the likeliest.

lm_head.py has the mathematics. Its two steps are two kernels here, both RMSNorm included:
1. *Bounds* reads the rounded rows. `dp4a` multiplies four bytes by four bytes and adds up, so a
   weight costs less than one instruction. Few programs each walk over many rows, and each leaves
   the largest lower bound of its rows.
2. *Rows* compares upper bounds with what the programs left: their maximum, or of those maxima the
   k-th largest (at least k rows reach it). It computes the logits of the rows that remain and
   fills the others. Without bounds it computes all rows: the same code, so the same bits.

The LM head stores W itself, not its transpose: a row is contiguous. Every row is read in the same
pattern, whichever rows are read with it.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu.parts import inverse_rms_of, load_norm
from gpu.product import product
from lm_head import LARGEST_V, certificate_for, limits
from sparse_gemv import PTX, launch_options, to_float32


@triton.jit
def _normalised(x_ptr, norm_ptr, k, inside, eps, K: tl.constexpr):
    """RMSNorm of x [K] in float32, in the shape of k; 0 where not inside."""
    x = tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)
    weight = load_norm(norm_ptr, k, inside)
    return x * inverse_rms_of(x, eps, K) * weight


@triton.jit
def _dot4(a, b):
    """The sum of four products of bytes, for each pair of int32."""
    if PTX:
        return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b],
                                         dtype=tl.int32, is_pure=True, pack=1)
    else:
        return ((a << 24 >> 24) * (b << 24 >> 24) + (a << 16 >> 24) * (b << 16 >> 24)
                + (a << 8 >> 24) * (b << 8 >> 24) + (a >> 24) * (b >> 24))


@triton.jit
def _penalized(bound, seen, penalty):
    """As in sampling.py."""
    return tl.where(seen, tl.where(bound < 0, bound * penalty, bound / penalty), bound)


@triton.jit
def _bounds_kernel(x_ptr, norm_ptr, q_ptr, rows_ptr, seen_ptr, logits_ptr, upper_ptr, lower_ptr,
                   eps, penalty, K: tl.constexpr, V: tl.constexpr, LIMIT: tl.constexpr,
                   LARGEST: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
                   PDL: tl.constexpr):
    """One program: the upper bounds of many rows, and their largest lower bound."""
    program, step = tl.program_id(0), tl.num_programs(0)
    word, row = tl.arange(0, WORDS), tl.arange(0, ROWS)
    places = row[:, None] * (K // 4) + word[None, :]
    here = (word < K // 4)[None, :]
    q = tl.load(q_ptr + program * ROWS * (K // 4) + places,
                mask=here & (program * ROWS + row < V)[:, None], other=0)
    if PDL:  # The kernel before may still run: wait here until what it writes is there.
        gdc_wait()
    k = word[:, None] * 4 + tl.arange(0, 4)[None, :]
    h = _normalised(x_ptr, norm_ptr, k, k < K, eps, K)
    # t, so small that integers are at most LARGEST, so large that q . v stays below 2**31
    t = tl.max(tl.max(tl.abs(h), axis=1), axis=0) / LARGEST
    exact = h / t
    norm = tl.sqrt(tl.sum(exact * exact))
    grown = tl.maximum(1.0, norm * (127 * K ** 0.5 / 2 ** 30))
    t, exact, norm = t * grown, exact / grown, norm / grown
    v = tl.floor(exact + 0.5)
    rest = tl.sqrt(tl.sum((exact - v) * (exact - v))) + norm * (K * 2.0 ** -23 + 2.0 ** -19)
    v = v.to(tl.int32)
    high = (v + 128) >> 8
    shift = (8 * tl.arange(0, 4))[None, :]
    low = tl.sum((v - high * 256 & 255) << shift, axis=1)[None, :]
    high = tl.sum((high & 255) << shift, axis=1)[None, :]

    best, proven = tl.full([ROWS], float("-inf"), tl.float32), tl.full([ROWS], 1, tl.int32)
    for block in tl.range(program, (V + ROWS - 1) // ROWS, step, num_stages=1):
        n = block * ROWS + row
        inside = n < V
        # The next rows are on their way while these are multiplied.
        following = (block + step) * ROWS
        next_q = tl.load(q_ptr + following * (K // 4) + places,
                         mask=here & (following + row < V)[:, None], other=0)
        scale = tl.load(rows_ptr + n, mask=inside, other=0.0)
        q_error = tl.load(rows_ptr + V + n, mask=inside, other=0.0)
        w_norm = tl.load(rows_ptr + 2 * V + n, mask=inside, other=0.0)
        y = tl.sum(_dot4(q, high) * 256 + _dot4(q, low), axis=1).to(tl.float32) * (t * scale)
        radius = t * (q_error * norm + w_norm * rest) * (1 + 2.0 ** -8) + 1e-28
        upper = (y + radius).to(logits_ptr.dtype.element_ty).to(tl.float32)
        lower = (y - radius).to(logits_ptr.dtype.element_ty).to(tl.float32)
        if seen_ptr is not None:
            seen = tl.load(seen_ptr + n, mask=inside, other=0) != 0
            upper, lower = _penalized(upper, seen, penalty), _penalized(lower, seen, penalty)
        proven &= ~inside | ((upper < LIMIT) & (lower > -LIMIT))  # false for a NaN
        best = tl.maximum(best, tl.where(inside, lower, float("-inf")))
        tl.store(upper_ptr + n, upper, mask=inside)
        q = next_q
    if PDL:
        gdc_launch_dependents()
    best = tl.max(best, axis=0)
    tl.store(lower_ptr + program, tl.where(tl.min(proven, axis=0) == 1, best, float("inf")))


@triton.jit
def _threshold(lower_ptr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, TOP: tl.constexpr):
    """The TOP-th largest of the GROUPS lower bounds, or a little less; -infinity if the bounds
    prove nothing."""
    i = tl.arange(0, GROUPS_PADDED)
    lower = tl.load(lower_ptr + i, mask=i < GROUPS, other=float("-inf"))
    threshold = tl.max(lower, axis=0)
    proven = threshold < float("inf")
    if TOP > 1:
        # Floats as integers of the same order, without the last 7 of 32 bits. Bit by bit, the
        # largest integer that TOP of them reach.
        order = lower.to(tl.int32, bitcast=True)
        order = (order ^ ((order >> 31) & 0x7fffffff)) >> 7
        reached = -(2 ** 24)
        for bit in tl.static_range(25):
            more = reached + (2 ** (24 - bit))
            reached = tl.where(tl.sum((order >= more).to(tl.int32), axis=0) >= TOP, more, reached)
        reached <<= 7
        reached ^= (reached >> 31) & 0x7fffffff
        threshold = reached.to(tl.float32, bitcast=True)
    return tl.where(proven, threshold, float("-inf"))


@triton.jit
def _read_rows(w_ptr, list_ptr, first, at, count, K: tl.constexpr, V: tl.constexpr,
               ROWS: tl.constexpr, K_PADDED: tl.constexpr):
    """The next ROWS rows from `at` on, of a list if there is one: (n, whether it is one, W[n])."""
    k = tl.arange(0, K_PADDED)
    place = at + tl.arange(0, ROWS)
    inside = place < count
    n = first + place
    if list_ptr is not None:
        n = tl.load(list_ptr + n, mask=inside, other=0)
    start = (n.to(tl.int64) if K * V >= 2 ** 31 else n) * K
    w = tl.load(w_ptr + start[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :],
                other=0.0, eviction_policy="evict_first")
    return n, inside, w


@triton.jit
def _rows_kernel(x_ptr, norm_ptr, w_ptr, upper_ptr, lower_ptr, list_ptr, read_ptr, logits_ptr, eps,
                 K: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr,
                 GROUPS_PADDED: tl.constexpr, TOP: tl.constexpr, FILL: tl.constexpr,
                 BLOCK: tl.constexpr, ROWS: tl.constexpr, K_PADDED: tl.constexpr,
                 PDL: tl.constexpr):
    """One program: of BLOCK logits, those that can be among the TOP largest; all without bounds."""
    BOUNDS: tl.constexpr = upper_ptr is not None
    first = tl.program_id(0) * BLOCK
    count = tl.minimum(BLOCK, V - first)
    if not BOUNDS:
        n, inside, w = _read_rows(w_ptr, list_ptr, first, 0, count, K, V, ROWS, K_PADDED)
    if PDL:  # The kernel before may still run: wait here until what it writes is there.
        gdc_wait()
        if BOUNDS:
            gdc_launch_dependents()
    if BOUNDS:
        i = first + tl.arange(0, BLOCK)
        upper = tl.load(upper_ptr + i, mask=i < V, other=float("-inf"))
        read = (i < V) & ~(upper < _threshold(lower_ptr, GROUPS, GROUPS_PADDED, TOP))
        fill = tl.full([BLOCK], FILL, tl.float32).to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + i, fill, mask=(i < V) & ~read)
        count = tl.sum(read.to(tl.int32), axis=0)
        if count == 0:
            return
        tl.store(list_ptr + first + tl.cumsum(read.to(tl.int32), 0) - 1, i, mask=read)
        tl.atomic_add(read_ptr, count.to(tl.int64), sem="relaxed")
        tl.debug_barrier()  # all threads have stored
        n, inside, w = _read_rows(w_ptr, list_ptr, first, 0, count, K, V, ROWS, K_PADDED)
    k = tl.arange(0, K_PADDED)
    h = _normalised(x_ptr, norm_ptr, k, k < K, eps, K)
    for at in tl.range(0, count, ROWS, num_stages=1):
        # The next rows are on their way while these are multiplied.
        next_n, next_inside, next_w = _read_rows(w_ptr, list_ptr, first, at + ROWS, count, K, V,
                                                 ROWS, K_PADDED)
        y = tl.sum(to_float32(w) * h[None, :], axis=1)
        tl.store(logits_ptr + n, y.to(logits_ptr.dtype.element_ty), mask=inside)
        n, inside, w = next_n, next_inside, next_w
    if PDL:
        if not BOUNDS:
            gdc_launch_dependents()


class Head:
    """The LM head of a GPU's decode steps, with the RMSNorm before it.

    linear: the model's `lm_head`
    norm:   (weight [K], eps)
    top:    how many of the largest logits matter, 0 for all
    seen, penalty: see `penalize`; the largest are those after it

    `bounds` is the Certificate that every call reads, or None where it reads all of W instead.
    With bounds, `rows_read`, int64 [1], counts the rows of W that the calls read.
    """

    def __init__(self, linear, norm, top=0, seen=None, penalty=1.0):
        self.linear, self.norm, self.top = linear, norm, top
        self.seen, self.penalty = seen if penalty != 1 else None, penalty
        v, k, device = linear.ends[-1], linear.in_features, linear.w_t.device
        # Chosen by timing five heads on an H200; eight or four programs fit on each of 132
        # multiprocessors. A program loads so many bytes at once, with and without bounds, for the
        # same bits.
        self.warps, self.bytes, programs = (2, 8192, 1056) if k <= 2048 else (4, 16384, 528)
        self.block = min(256, max(64, triton.next_power_of_2(v // programs)))
        self.rows = max(1, self.bytes // triton.next_power_of_2(k))  # of integers, loaded at once
        self.programs = min(programs, triton.cdiv(v, self.rows))
        self.rows_read = torch.zeros(1, dtype=torch.int64, device=device)
        self.bounds = certificate_for(linear, top)
        self.upper = self.lower = self.list = None
        if self.bounds is not None:
            self.upper, self.lower = (torch.empty(n, device=device) for n in (v, self.programs))
            self.list = torch.empty(v, dtype=torch.int32, device=device)

    def __call__(self, x, logits):
        """x [K] -> logits [V]; of those that do not matter, some are `limits`' number instead.

        Call it once before capturing a CUDA graph. The kernel before must not write weights.
        """
        if self.linear.scale is not None:
            product(x, self.linear.w_t, None, logits, scale=self.linear.scale, norm=self.norm)
            return logits
        w, (norm, eps), groups = self.linear.w_t.T, self.norm, 0
        (v, k), (limit, fill) = w.shape, limits(logits.dtype)
        k_padded = triton.next_power_of_2(k)
        rows = max(1, self.bytes // w.element_size() // k_padded)
        launch = {"num_warps": self.warps} | launch_options(x.device)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            if self.bounds is not None:
                groups = self.programs
                _bounds_kernel[(groups,)](
                    x, norm, self.bounds.q.view(torch.int32), self.bounds.rows, self.seen, logits,
                    self.upper, self.lower, eps, self.penalty, K=k, V=v, LIMIT=limit,
                    LARGEST=LARGEST_V, ROWS=self.rows, WORDS=k_padded // 4, **launch)
            _rows_kernel[(triton.cdiv(v, self.block),)](
                x, norm, w, self.upper, self.lower, self.list, self.rows_read, logits, eps, K=k,
                V=v, GROUPS=groups, GROUPS_PADDED=triton.next_power_of_2(groups), TOP=self.top,
                FILL=fill, BLOCK=self.block, ROWS=rows, K_PADDED=k_padded, **launch)
        return logits

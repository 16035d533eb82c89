"""y = W x in one Triton kernel, where `sparse_gemv` needs two: every row of W, or those x keeps.

**Every row**, for small matrices and the dtypes that `tensor_gemv` does not take. `sparse_gemv`
needs a list of rows before it can ask for the first of them. A dense product knows its rows from
the start, and its weights do not depend on the kernel in front of it. So with programmatic
dependent launch, a program asks for its first weights, then waits for x. The memory stays busy
between two kernels.

**The rows that x keeps**, where a program has few rows. A list of rows needs a kernel of its own,
which costs a launch. Here each program looks at its own piece of x, and the mask of its loads is
false for a dropped row. The price: a tile has room for all rows, and only the kept ones arrive. A
list fills whole tiles with kept rows, so half the rows take half the turns of the loop. Where a
program has many rows, those turns cost more than a launch: then `sparse_gemv` is faster.

The layout, split-K and the fusions are those of sparse_gemv.py, which explains them.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_gemv import WARPS, _to_float32, supports_pdl


@triton.jit
def _norm_weights(norm_ptr, k, end_k):
    """RMSNorm's weights of x[k] in float32; 1 if there is no norm."""
    if norm_ptr is None:
        return 1.0
    else:
        return tl.load(norm_ptr + k, mask=k < end_k, other=0.0).to(tl.float32)


@triton.jit
def _inputs(x_ptr, norm, k, end_k, inverse_rms, K: tl.constexpr, SWIGLU: tl.constexpr):
    """x[k], and 0 beyond the last; `norm` are its RMSNorm's weights."""
    inside = k < end_k
    x = tl.load(x_ptr + k, mask=inside, other=0.0)
    if SWIGLU:
        gate = x.to(tl.float32)
        up = tl.load(x_ptr + K + k, mask=inside, other=0.0).to(tl.float32)
        x = (gate / (1 + tl.exp(-gate)) * up).to(x.dtype)
    return (x.to(tl.float32) * inverse_rms * norm).to(x.dtype)


@triton.jit
def _kept_inputs(x_ptr, norm, k, end_k, inverse_rms, threshold, K: tl.constexpr,
                 SWIGLU: tl.constexpr):
    """x[k] in float32, 0 if dropped, and whether it is kept.

    A dropped row of weights is 0 without being read. Times an infinite x, it would be NaN.
    """
    x = _inputs(x_ptr, norm, k, end_k, inverse_rms, K, SWIGLU).to(tl.float32)
    keep = (k < end_k) & ~(tl.abs(x) <= threshold)
    return tl.where(keep, x, 0.0), keep


@triton.jit
def _weights(w_ptr, k, end_k, keep, n, K: tl.constexpr, N: tl.constexpr,
             FULL_TILES: tl.constexpr):
    """The tile of rows k and columns n; 0 for rows that are not kept and beyond the last."""
    offsets = (k.to(tl.int64) if K * N >= 2 ** 31 else k)[:, None] * N + n[None, :]
    inside = (k < end_k)[:, None]
    if keep is not None:
        inside &= keep[:, None]
    if not FULL_TILES:
        inside &= (n < N)[None, :]
    return tl.load(w_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _count_every_row(kept_ptr, matrices, K: tl.constexpr):
    """Add K to the counts of so many matrices side by side."""
    i = tl.arange(0, 4)
    tl.store(kept_ptr + i, tl.load(kept_ptr + i, mask=i < matrices) + K, mask=i < matrices)


@triton.jit
def _is_not_last(y, sums_ptr, inside, finished_ptr, SPLITS: tl.constexpr):
    """Leave y for the program that finishes last; whether this one is another."""
    tl.store(sums_ptr, y, mask=inside)
    tl.debug_barrier()  # all threads have stored
    return tl.atomic_add(finished_ptr, 1, sem="acq_rel") < SPLITS - 1


@triton.jit
def _add_splits(sums_ptr, inside, finished_ptr, N: tl.constexpr, SPLITS: tl.constexpr):
    """What all splits left, added up in their order."""
    y = tl.zeros(inside.shape, tl.float32)
    for other in tl.static_range(SPLITS):
        # ".cg": from the L2 cache, where the other multiprocessors' sums arrive
        y += tl.load(sums_ptr + other * N, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(finished_ptr, 0)  # for the next launch
    return y


@triton.jit
def _store(y, n, end, out_ptr, bias_ptr, residual_ptr):
    """Add what is fused into a product, and store it."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < end)


@triton.jit(do_not_specialize_on_alignment=["kept_ptr", "threshold_ptr"])
def _dense_kernel(x_ptr, norm_ptr, w_ptr, out_ptr, bias_ptr, residual_ptr, sums_ptr,
                  finished_ptr, kept_ptr, threshold_ptr, eps, K: tl.constexpr, N: tl.constexpr,
                  END0: tl.constexpr, END1: tl.constexpr, CHUNK: tl.constexpr,
                  SPLITS: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, ROWS_AT_ONCE: tl.constexpr, K_PADDED: tl.constexpr,
                  LATE: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over CHUNK rows, or over those that x keeps."""
    program, part = tl.program_id(0), tl.program_id(1)
    SPARSE: tl.constexpr = threshold_ptr is not None
    FULL_TILES: tl.constexpr = N % BLOCK_N == 0
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    k = part * CHUNK + tl.arange(0, BLOCK_K)
    end_k = tl.minimum((part + 1) * CHUNK, K)
    keep = None  # every row
    if SPARSE:  # The tile lies within one of the matrices side by side.
        start = program * BLOCK_N
        segment = (start >= END0).to(tl.int32) + (start >= END1).to(tl.int32)
        threshold = tl.load(threshold_ptr + segment)
        norm = _norm_weights(norm_ptr, k, end_k)
    else:
        w = _weights(w_ptr, k, end_k, keep, n, K, N, FULL_TILES)
    if PDL:  # The kernel in front may still run: wait here until what it writes is there.
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()  # its programs ask for their weights as soon as there is room
    inverse_rms = 1.0
    if norm_ptr is not None:
        every_k = tl.arange(0, K_PADDED)
        hidden = tl.load(x_ptr + every_k, mask=every_k < K, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden) / K + eps)
    total = tl.zeros([ROWS_AT_ONCE, BLOCK_N], tl.float32)
    if SPARSE:
        x, keep = _kept_inputs(x_ptr, norm, k, end_k, inverse_rms, threshold, K, SWIGLU)
        w = _weights(w_ptr, k, end_k, keep, n, K, N, FULL_TILES)
        count = keep.to(tl.int32)
    # If ptxas knew that a sparse loop has one turn, it would load the rows one after the other.
    rows = end_k - part * CHUNK if SPARSE else CHUNK
    for first in tl.range(0, rows, BLOCK_K, num_stages=1):
        # The next weights are on their way while these are multiplied.
        if SPARSE:
            norm = _norm_weights(norm_ptr, k + BLOCK_K, end_k)
            next_x, keep = _kept_inputs(x_ptr, norm, k + BLOCK_K, end_k, inverse_rms, threshold,
                                        K, SWIGLU)
            count += keep.to(tl.int32)
        next_w = _weights(w_ptr, k + BLOCK_K, end_k, keep, n, K, N, FULL_TILES)
        if not SPARSE:
            norm = _norm_weights(norm_ptr, k, end_k)
            x = _inputs(x_ptr, norm, k, end_k, inverse_rms, K, SWIGLU)
        products = _to_float32(w) * x.to(tl.float32)[:, None]
        products = tl.reshape(products, [BLOCK_K // ROWS_AT_ONCE, ROWS_AT_ONCE, BLOCK_N])
        total += tl.sum(products, axis=0)
        k += BLOCK_K
        w = next_w
        if SPARSE:
            x = next_x

    if PDL and LATE:  # Programs that wait would fill the multiprocessors unevenly.
        gdc_launch_dependents()
    if kept_ptr is not None:
        if SPARSE:
            if (start == 0) | (start == END0) | (start == END1):  # a matrix's first tile
                tl.atomic_add(kept_ptr + segment, tl.sum(count).to(tl.int64), sem="relaxed")
        elif (program == 0) & (part == 0):
            _count_every_row(kept_ptr, 1 + (END0 < N) + (END1 < N), K)
    y = tl.sum(total, axis=0)
    if SPLITS > 1:
        if _is_not_last(y, sums_ptr + part * N + n, n < N, finished_ptr + program, SPLITS):
            return
        y = _add_splits(sums_ptr + n, n < N, finished_ptr + program, N, SPLITS)
    _store(y, n, N, out_ptr, bias_ptr, residual_ptr)


@functools.lru_cache(maxsize=None)
def _workspace(device, n, splits, n_programs):
    """Sums, splits finished so far."""
    return (torch.empty(splits * n, dtype=torch.float32, device=device),
            torch.zeros(n_programs, dtype=torch.int32, device=device))


def is_small(k, n):
    """Whether a matrix [k, n] counts as small, here and in gpu_gemv.py."""
    return min(k, n) <= 2048


def _launch_shape(k, n, sparse):
    """(BLOCK_N, BLOCK_K, CHUNK, LATE) for w_t [k, n].

    Chosen by timing whole 1B and 7B models on an H100. Small matrices want more programs, and the
    next kernel later. So do sparse products, whose tiles have at most 64 rows.
    """
    block_n = min(64, max(16, triton.next_power_of_2(n)))
    late = sparse or is_small(k, n)
    programs, most, least = (1024, 16, 128) if late else (768, 8, 256)
    splits = max(1, min(most, round(programs / triton.cdiv(n, block_n)), k // least))
    rows = triton.cdiv(k, splits)
    block_k = min(64 if sparse else 128, max(32, triton.next_power_of_2(rows)))
    return block_n, block_k, triton.cdiv(rows, block_k) * block_k, late


def one_kernel_pays(x, w_t, ends):
    """Whether a sparse product is faster in one kernel; x, w_t and ends are as in `sparse_gemv`.

    A tile of 64 columns must lie within one matrix. On an H100, programs of six tiles of 64 rows
    were faster, programs of eight slower. Weights of fewer bits than x gained nothing.
    """
    if w_t.dtype != x.dtype or any(end % 64 for end in ends or w_t.shape[1:]):
        return False
    _, _, chunk, _ = _launch_shape(*w_t.shape, True)
    return chunk <= 6 * 64


def dense_gemv(x, w_t, out, *, thresholds=None, ends=None, bias=None, norm=None, swiglu=False,
               residual=None, kept=None):
    """`sparse_gemv` in one kernel, on a GPU or in the interpreter; the same arguments but for:

    w_t:        of x's dtype
    thresholds: None to read every row, as the threshold -1 would; or float32, one for each of the
                matrices of `ends`, where every end is a multiple of 64 (see `one_kernel_pays`)

    `out` may be `residual` itself. The same inputs give the same bits. Call it once with these
    shapes before capturing a CUDA graph. The kernel in front must not write w_t, thresholds or
    norm's weight: they are read before it ends. Nothing is checked here.
    """
    k, n = w_t.shape
    block_n, block_k, chunk, late = _launch_shape(k, n, thresholds is not None)
    tiles, splits = triton.cdiv(n, block_n), triton.cdiv(k, chunk)
    end0, end1, _ = (*(ends or [n]), n, n)[:3]
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    pdl = supports_pdl(x.device)
    rows_at_once = min(block_k, WARPS * 32 * (16 // w_t.element_size()) // block_n)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _dense_kernel[(tiles, splits)](
            x, norm_weight, w_t, out, bias, residual,
            *_workspace(x.device, n, splits, tiles), kept, thresholds, eps, K=k, N=n, END0=end0,
            END1=end1, CHUNK=chunk, SPLITS=splits, SWIGLU=swiglu, BLOCK_N=block_n,
            BLOCK_K=block_k, ROWS_AT_ONCE=rows_at_once, K_PADDED=triton.next_power_of_2(k),
            LATE=late, PDL=pdl, num_warps=WARPS, **({"launch_pdl": True} if pdl else {}))
    return out

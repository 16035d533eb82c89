"""y = W x in one kernel, where lists of rows need two: every row of W, or those that x keeps.

**Every row**, for small matrices and the dtypes that tensor cores do not take here. A product by
lists must have its list before it can load the first row. A dense product knows its rows from the
start, and its weights do not depend on the kernel before it. So with dependent launch, a program
starts to load its first weights, then waits for x. The memory stays busy between two kernels.

**The rows that x keeps**, where a program has few rows. A list of rows needs a kernel of its own,
which costs a launch. Here each program looks at its own piece of x, and the mask of its loads is
false for a dropped row. The price: a tile has room for all rows, and only the kept ones arrive. A
list fills whole tiles with kept rows, so half the rows take half the turns of the loop. Where a
program has many rows, those turns cost more than a launch: then lists are faster.

sparse_gemv.py explains split-K, dependent launch and the parts of kernels.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu.parts import count_every_row, inverse_rms, load_norm, load_x, normalize
from sparse_gemv import WARPS, finish, launch_options, to_float32, workspace


@triton.jit
def _weights(w_ptr, k, inside, n, K: tl.constexpr, N: tl.constexpr, FULL_TILES: tl.constexpr):
    """The tile of rows k and columns n; 0 for rows not inside and beyond the last column."""
    offsets = (k.to(tl.int64) if K * N >= 2 ** 31 else k)[:, None] * N + n[None, :]
    mask = inside[:, None]
    if not FULL_TILES:
        mask &= (n < N)[None, :]
    return tl.load(w_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _add_products(total, w, x, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
                  ROWS_AT_ONCE: tl.constexpr):
    """total [ROWS_AT_ONCE, BLOCK_N] plus the rows w [BLOCK_K, BLOCK_N], each times its x."""
    products = to_float32(w) * x.to(tl.float32)[:, None]
    products = tl.reshape(products, [BLOCK_K // ROWS_AT_ONCE, ROWS_AT_ONCE, BLOCK_N])
    return total + tl.sum(products, axis=0)


@triton.jit(do_not_specialize_on_alignment=["kept_ptr"])
def _every_row_kernel(x_ptr, norm_ptr, w_ptr, out_ptr, bias_ptr, residual_ptr, sums_ptr,
                      finished_ptr, kept_ptr, eps, K: tl.constexpr, N: tl.constexpr,
                      MATRICES: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
                      SWIGLU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                      ROWS_AT_ONCE: tl.constexpr, K_PADDED: tl.constexpr, LATE: tl.constexpr,
                      PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over CHUNK rows."""
    chunk = tl.program_id(1)
    FULL_TILES: tl.constexpr = N % BLOCK_N == 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = chunk * CHUNK + tl.arange(0, BLOCK_K)
    end_k = tl.minimum((chunk + 1) * CHUNK, K)
    w = _weights(w_ptr, k, k < end_k, n, K, N, FULL_TILES)
    if PDL:
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()  # its programs load their first weights when there is room
    shrink = 1.0
    if norm_ptr is not None:
        shrink = inverse_rms(x_ptr, eps, K, K_PADDED)
    total = tl.zeros([ROWS_AT_ONCE, BLOCK_N], tl.float32)
    for first in tl.range(0, CHUNK, BLOCK_K, num_stages=1):
        # The next weights are on their way while these are multiplied.
        next_k = k + BLOCK_K
        next_w = _weights(w_ptr, next_k, next_k < end_k, n, K, N, FULL_TILES)
        weight = load_norm(norm_ptr, k, k < end_k)
        x = normalize(load_x(x_ptr, k, k < end_k, K, SWIGLU), shrink, weight)
        total = _add_products(total, w, x, BLOCK_K, BLOCK_N, ROWS_AT_ONCE)
        k, w = next_k, next_w

    if PDL and LATE:  # Programs that wait would fill the multiprocessors unevenly.
        gdc_launch_dependents()
    if kept_ptr is not None:
        count_every_row(kept_ptr, MATRICES, K)
    finish(tl.sum(total, axis=0), n, N, out_ptr, None, bias_ptr, residual_ptr, sums_ptr,
           finished_ptr, N, SPLITS)


@triton.jit
def _kept_x(x_ptr, weight, k, end_k, shrink, threshold, K: tl.constexpr, SWIGLU: tl.constexpr):
    """x[k] in float32, 0 if dropped, and whether it is kept.

    A dropped row of weights is 0 without being read. Times an infinite x, it would be NaN.
    """
    x = normalize(load_x(x_ptr, k, k < end_k, K, SWIGLU), shrink, weight).to(tl.float32)
    keep = (k < end_k) & ~(tl.abs(x) <= threshold)
    return tl.where(keep, x, 0.0), keep


@triton.jit(do_not_specialize_on_alignment=["kept_ptr", "threshold_ptr"])
def _kept_rows_kernel(x_ptr, norm_ptr, w_ptr, out_ptr, bias_ptr, residual_ptr, sums_ptr,
                      finished_ptr, kept_ptr, threshold_ptr, eps, K: tl.constexpr,
                      N: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr,
                      CHUNK: tl.constexpr, SPLITS: tl.constexpr, SWIGLU: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
                      K_PADDED: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over those of CHUNK rows that x keeps."""
    chunk, start = tl.program_id(1), tl.program_id(0) * BLOCK_N
    FULL_TILES: tl.constexpr = N % BLOCK_N == 0
    n = start + tl.arange(0, BLOCK_N)
    k = chunk * CHUNK + tl.arange(0, BLOCK_K)
    end_k = tl.minimum((chunk + 1) * CHUNK, K)
    matrix = (start >= END0).to(tl.int32) + (start >= END1).to(tl.int32)
    threshold = tl.load(threshold_ptr + matrix)
    weight = load_norm(norm_ptr, k, k < end_k)
    if PDL:
        gdc_wait()
    shrink = 1.0
    if norm_ptr is not None:
        shrink = inverse_rms(x_ptr, eps, K, K_PADDED)
    total = tl.zeros([ROWS_AT_ONCE, BLOCK_N], tl.float32)
    x, keep = _kept_x(x_ptr, weight, k, end_k, shrink, threshold, K, SWIGLU)
    w = _weights(w_ptr, k, keep, n, K, N, FULL_TILES)
    count = keep.to(tl.int32)
    # Not up to CHUNK: if ptxas, which makes machine code of PTX, knew that the loop has one turn,
    # it would load the rows one after the other.
    for first in tl.range(0, end_k - chunk * CHUNK, BLOCK_K, num_stages=1):
        # The next weights are on their way while these are multiplied.
        k += BLOCK_K
        weight = load_norm(norm_ptr, k, k < end_k)
        next_x, keep = _kept_x(x_ptr, weight, k, end_k, shrink, threshold, K, SWIGLU)
        count += keep.to(tl.int32)
        next_w = _weights(w_ptr, k, keep, n, K, N, FULL_TILES)
        total = _add_products(total, w, x, BLOCK_K, BLOCK_N, ROWS_AT_ONCE)
        x, w = next_x, next_w

    if PDL:
        gdc_launch_dependents()
    if kept_ptr is not None:
        if (start == 0) | (start == END0) | (start == END1):  # a matrix's first tile
            tl.atomic_add(kept_ptr + matrix, tl.sum(count).to(tl.int64), sem="relaxed")
    finish(tl.sum(total, axis=0), n, N, out_ptr, None, bias_ptr, residual_ptr, sums_ptr,
           finished_ptr, N, SPLITS)


def is_small(k, n):
    """Whether a matrix [k, n] counts as small, here and in gpu/product.py."""
    return min(k, n) <= 2048


def _cut(k, n, sparse):
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
    """Whether a sparse product is faster in one kernel; arguments as for `product_by_lists`.

    A tile of 64 columns must lie within one matrix. On an H100, programs of six tiles of 64 rows
    were faster, programs of eight slower. Weights of fewer bits than x gained nothing.
    """
    if w_t.dtype != x.dtype or any(end % 64 for end in ends or w_t.shape[1:]):
        return False
    _, _, chunk, _ = _cut(*w_t.shape, True)
    return chunk <= 6 * 64


def product_in_one_kernel(x, w_t, thresholds, out, *, ends=None, bias=None, norm=None,
                          swiglu=False, residual=None, kept=None):
    """`product_by_lists` in one kernel; the same arguments but for:

    w_t:        of x's dtype
    thresholds: None reads every row. Otherwise all `ends` are multiples of 64.

    The kernel before must not write w_t, thresholds or norm's weight: they are read before it ends.
    """
    (k, n), sparse = w_t.shape, thresholds is not None
    ends = ends or (n,)
    block_n, block_k, chunk, late = _cut(k, n, sparse)
    tiles, splits = triton.cdiv(n, block_n), triton.cdiv(k, chunk)
    weight, eps = norm or (None, 0.0)
    sums = workspace(x.device, (splits * n, torch.float32), (tiles, torch.int32))
    arguments = x, weight, w_t, out, bias, residual, *sums, kept
    options = launch_options(x.device) | {
        "K": k, "N": n, "CHUNK": chunk, "SPLITS": splits, "SWIGLU": swiglu, "BLOCK_N": block_n,
        "BLOCK_K": block_k, "K_PADDED": triton.next_power_of_2(k), "num_warps": WARPS,
        "ROWS_AT_ONCE": min(block_k, WARPS * 32 * (16 // w_t.itemsize) // block_n)}
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if sparse:
            end0, end1 = (*ends, n)[:2]
            _kept_rows_kernel[(tiles, splits)](*arguments, thresholds, eps, END0=end0, END1=end1,
                                               **options)
        else:
            _every_row_kernel[(tiles, splits)](*arguments, eps, MATRICES=len(ends), LATE=late,
                                               **options)
    return out

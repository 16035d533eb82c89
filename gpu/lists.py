"""y = W x by lists of rows, as `sparse_gemv` computes it, with what a decode step fuses into it.

Each operation next to a product would cost a launch, some microseconds. So select first
applies RMSNorm or SwiGLU to x, and sum rows adds a bias and the residual stream at the end. Up to
three matrices lie side by side in one w_t, as q, k and v do; each has its threshold, and so a list
of its own for each chunk of x.

The parts of both kernels are those of sparse_gemv.py, which explains them.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu.parts import cut_tiles, find_tile, inverse_rms, load_norm, load_x, normalize
from sparse_gemv import WARPS, finish, launch_options, sum_list, tile_shape, workspace, write_list


@triton.jit(do_not_specialize_on_alignment=["kept_ptr", "threshold_ptr"])
def _fused_select_kernel(x_ptr, norm_ptr, rows_ptr, values_ptr, counts_ptr, kept_ptr,
                         threshold_ptr, eps, K: tl.constexpr, CHUNK: tl.constexpr,
                         SWIGLU: tl.constexpr, CHUNK_PADDED: tl.constexpr,
                         K_PADDED: tl.constexpr, PDL: tl.constexpr):
    """One program: the list of one chunk of x, for one of the matrices."""
    matrix, chunk = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, CHUNK_PADDED)
    k = chunk * CHUNK + i
    inside = (i < CHUNK) & (k < K)
    weight = load_norm(norm_ptr, k, inside)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    threshold = tl.load(threshold_ptr + matrix)
    x = load_x(x_ptr, k, inside, K, SWIGLU)
    if norm_ptr is not None:
        x = normalize(x, inverse_rms(x_ptr, eps, K, K_PADDED), weight)
    keep = inside & ~(tl.abs(x.to(tl.float32)) <= threshold)
    count = write_list(k, x, keep, matrix * tl.num_programs(1) + chunk, rows_ptr, values_ptr,
                       counts_ptr, CHUNK)
    if kept_ptr is not None:  # "relaxed": nobody concludes anything else from this number
        tl.atomic_add(kept_ptr + matrix, count.to(tl.int64), sem="relaxed")


@triton.jit
def _fused_sum_kernel(rows_ptr, values_ptr, counts_ptr, w_ptr, out_ptr, scale_ptr, bias_ptr,
                      residual_ptr, sums_ptr, finished_ptr, K: tl.constexpr, N: tl.constexpr,
                      END0: tl.constexpr, END1: tl.constexpr, CHUNK: tl.constexpr,
                      SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                      ROWS_AT_ONCE: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns of one matrix, summed over one list."""
    matrix, start, end = find_tile(END0, END1, N, BLOCK_N)
    n = start + tl.arange(0, BLOCK_N)
    FULL_TILES: tl.constexpr = END0 % BLOCK_N == 0 and END1 % BLOCK_N == 0 and N % BLOCK_N == 0
    item = matrix * SPLITS + tl.program_id(1)
    if PDL:
        gdc_wait()
    total = sum_list(rows_ptr + item * CHUNK, values_ptr + item * CHUNK, tl.load(counts_ptr + item),
                     w_ptr, n, end, K, N, CHUNK, FULL_TILES, BLOCK_N, BLOCK_K, ROWS_AT_ONCE)
    if PDL:  # Not earlier: waiting programs of the next kernel would fill multiprocessors unevenly.
        gdc_launch_dependents()
    finish(tl.sum(total, axis=0), n, end, out_ptr, scale_ptr, bias_ptr, residual_ptr, sums_ptr,
           finished_ptr, N, SPLITS)


def select(x, thresholds, splits, norm=None, swiglu=False, kept=None):
    """Launch select for x: `splits` lists per threshold.

    Returns the lists (row numbers, values, counts), and the size of a chunk.
    """
    k, n_lists = x.numel() // (1 + swiglu), thresholds.numel() * splits
    chunk = triton.cdiv(k, splits)
    lists = workspace(x.device, (n_lists * chunk, torch.int32), (n_lists * chunk, x.dtype),
                      (n_lists, torch.int32))
    weight, eps = norm or (None, 0.0)
    chunk_padded, k_padded = triton.next_power_of_2(chunk), triton.next_power_of_2(k)
    entries = max(chunk_padded, k_padded if norm else 0)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _fused_select_kernel[(thresholds.numel(), splits)](
            x, weight, *lists, kept, thresholds, eps, K=k, CHUNK=chunk, SWIGLU=swiglu,
            CHUNK_PADDED=chunk_padded, K_PADDED=k_padded, num_warps=min(16, max(1, entries // 256)),
            **launch_options(x.device))
    return lists, chunk


@functools.lru_cache(maxsize=None)  # never freed: a captured graph may read it
def _keep_all(device, n):
    return torch.full((n,), -1.0, device=device)


def product_by_lists(x, w_t, thresholds, out, *, ends=None, scale=None, bias=None, norm=None,
                     swiglu=False, residual=None, kept=None):
    """y[n] = sum of x[k] * w_t[k, n] over the k with not (|x[k]| <= threshold), into `out`.

    x:          [K], 2 K wide with swiglu; float32, float16 or bfloat16
    w_t:        [K, N], contiguous; x's dtype, or int8 with a `scale`. Dropped rows are never read.
    thresholds: float32, one for each of the matrices of `ends`, which may change under a captured
                graph; None keeps every row
    out:        [N]; may be `residual` itself
    ends:       where up to three matrices lie side by side in w_t, the last column + 1 of each
    scale:      [N] float32, multiplies the sums (int8 weights: one scale per output channel)
    bias:       [N], added next
    norm:       (weight [K], eps): x is first RMS-normalised (in float32, rounded to x's dtype)
    swiglu:     x holds gate and up side by side; silu(gate) * up takes its place first
    residual:   [N], added last
    kept:       int64, one for each of the matrices: the number of kept rows is added to it

    On a GPU, or in Triton's interpreter. The same inputs give the same bits. Call it once with
    these shapes before capturing a CUDA graph. Calls on different streams must not overlap, and
    the kernel before must not write norm's weight. Nothing is checked here.
    """
    k, n = w_t.shape
    block_n, block_k, rows_at_once, splits = tile_shape(k, n, w_t.element_size())
    ends = ends or (n,)
    end0, end1, tiles = cut_tiles(ends, block_n)
    if thresholds is None:
        thresholds = _keep_all(x.device, len(ends))
    sums = workspace(x.device, (splits * n, torch.float32), (tiles, torch.int32))
    lists, chunk = select(x, thresholds, splits, norm, swiglu, kept)
    with torch.cuda.device_of(x):
        _fused_sum_kernel[(tiles, splits)](
            *lists, w_t, out, scale, bias, residual, *sums, K=k, N=n, END0=end0, END1=end1,
            CHUNK=chunk, SPLITS=splits, BLOCK_N=block_n, BLOCK_K=block_k,
            ROWS_AT_ONCE=rows_at_once, num_warps=WARPS, **launch_options(x.device))
    return out

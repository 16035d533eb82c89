"""y = W x that reads every row of W, in one Triton kernel: for dense decoding and the LM head.

`sparse_gemv` needs a list of rows before it can ask for the first of them. A dense product knows
its rows from the start, and its weights do not depend on the kernel in front of it. So with
programmatic dependent launch, a program asks for its first weights, then waits for x. The memory
stays busy between two kernels, and there is one kernel where `sparse_gemv` has two.

The layout, split-K and the fusions are those of sparse_gemv.py, which explains them.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_gemv import WARPS, _to_float32, supports_pdl


@triton.jit
def _weights(w_ptr, k, end_k, n, K: tl.constexpr, N: tl.constexpr, FULL_TILES: tl.constexpr):
    """The tile of rows k and columns n; 0 beyond the last of each."""
    offsets = (k.to(tl.int64) if K * N >= 2 ** 31 else k)[:, None] * N + n[None, :]
    inside = (k < end_k)[:, None]
    if not FULL_TILES:
        inside &= (n < N)[None, :]
    return tl.load(w_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _dense_kernel(x_ptr, norm_ptr, w_ptr, out_ptr, scale_ptr, bias_ptr, residual_ptr, sums_ptr,
                  finished_ptr, kept_ptr, eps, K: tl.constexpr, N: tl.constexpr,
                  SEGMENTS: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
                  SWIGLU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  ROWS_AT_ONCE: tl.constexpr, K_PADDED: tl.constexpr, SMALL: tl.constexpr,
                  PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over CHUNK rows."""
    program, part = tl.program_id(0), tl.program_id(1)
    FULL_TILES: tl.constexpr = N % BLOCK_N == 0
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    k = part * CHUNK + tl.arange(0, BLOCK_K)
    end_k = tl.minimum((part + 1) * CHUNK, K)
    w = _weights(w_ptr, k, end_k, n, K, N, FULL_TILES)
    if PDL:  # The kernel in front may still run: wait here until what it writes is there.
        gdc_wait()
        if not SMALL:
            gdc_launch_dependents()  # its programs ask for their weights as soon as there is room
    inverse_rms = 1.0
    if norm_ptr is not None:
        every_k = tl.arange(0, K_PADDED)
        hidden = tl.load(x_ptr + every_k, mask=every_k < K, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden) / K + eps)
    total = tl.zeros([ROWS_AT_ONCE, BLOCK_N], tl.float32)
    for first in tl.range(0, CHUNK, BLOCK_K, num_stages=1):
        # The next weights are on their way while these are multiplied.
        next_w = _weights(w_ptr, k + BLOCK_K, end_k, n, K, N, FULL_TILES)
        x = tl.load(x_ptr + k, mask=k < end_k, other=0.0)
        if SWIGLU:
            gate = x.to(tl.float32)
            up = tl.load(x_ptr + K + k, mask=k < end_k, other=0.0).to(tl.float32)
            x = (gate / (1 + tl.exp(-gate)) * up).to(x.dtype)
        if norm_ptr is not None:
            weight = tl.load(norm_ptr + k, mask=k < end_k, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) * inverse_rms * weight).to(x.dtype)
        products = _to_float32(w) * x.to(tl.float32)[:, None]
        products = tl.reshape(products, [BLOCK_K // ROWS_AT_ONCE, ROWS_AT_ONCE, BLOCK_N])
        total += tl.sum(products, axis=0)
        k += BLOCK_K
        w = next_w

    if PDL and SMALL:  # Programs that wait would fill the multiprocessors unevenly.
        gdc_launch_dependents()
    if kept_ptr is not None and (program == 0) & (part == 0):
        segment = tl.arange(0, 4)
        tl.store(kept_ptr + segment, tl.load(kept_ptr + segment, mask=segment < SEGMENTS) + K,
                 mask=segment < SEGMENTS)
    y = tl.sum(total, axis=0)
    if SPLITS > 1:
        tl.store(sums_ptr + part * N + n, y, mask=n < N)
        tl.debug_barrier()  # all threads have stored
        if tl.atomic_add(finished_ptr + program, 1, sem="acq_rel") < SPLITS - 1:
            return
        y = tl.zeros([BLOCK_N], tl.float32)
        for other in tl.static_range(SPLITS):
            y += tl.load(sums_ptr + other * N + n, mask=n < N, other=0.0, cache_modifier=".cg")
        tl.store(finished_ptr + program, 0)  # for the next launch
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@functools.lru_cache(maxsize=None)
def _workspace(device, n, splits, n_programs):
    """Sums, splits finished so far."""
    return (torch.empty(splits * n, dtype=torch.float32, device=device),
            torch.zeros(n_programs, dtype=torch.int32, device=device))


def is_small(k, n):
    """Whether a matrix [k, n] counts as small in what follows."""
    return min(k, n) <= 2048


def dense_gemv(x, w_t, out, *, ends=None, scale=None, bias=None, norm=None, swiglu=False,
               residual=None, kept=None):
    """`sparse_gemv` with the threshold -1, on a GPU or in the interpreter; the same arguments.

    `out` may be `residual` itself. The same inputs give the same bits. Call it once with these
    shapes before capturing a CUDA graph. Nothing is checked here.
    """
    k, n = w_t.shape
    block_n = min(64, max(16, triton.next_power_of_2(n)))
    tiles = triton.cdiv(n, block_n)
    # Chosen by timing whole 1B and 7B models on an H100: small matrices want more programs, and
    # the next kernel later.
    small = is_small(k, n)
    programs, most, least = (1024, 16, 128) if small else (768, 8, 256)
    splits = max(1, min(most, round(programs / tiles), k // least))
    block_k = min(128, max(32, triton.next_power_of_2(triton.cdiv(k, splits))))
    chunk = triton.cdiv(triton.cdiv(k, splits), block_k) * block_k
    splits = triton.cdiv(k, chunk)
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    pdl = supports_pdl(x.device)
    rows_at_once = min(block_k, WARPS * 32 * (16 // w_t.element_size()) // block_n)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _dense_kernel[(tiles, splits)](
            x, norm_weight, w_t, out, scale, bias, residual,
            *_workspace(x.device, n, splits, tiles), kept, eps, K=k, N=n,
            SEGMENTS=len(ends or [n]), CHUNK=chunk, SPLITS=splits, SWIGLU=swiglu,
            BLOCK_N=block_n, BLOCK_K=block_k, ROWS_AT_ONCE=rows_at_once,
            K_PADDED=triton.next_power_of_2(k), SMALL=small, PDL=pdl, num_warps=WARPS,
            **({"launch_pdl": True} if pdl else {}))
    return out

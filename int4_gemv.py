"""y = W x for one token with 4-bit weights, reading only the rows that matter: a Triton kernel.

`sparse_gemv.py` explains the two kernels and holds the one that selects. This file holds the one
that sums rows of 4-bit weights. A group of 32 weights of one row shares a scale s and a minimum m,
so that a dropped row is dropped with its scales, and a weight is s * q + m, q from 0 to 15:

    y[n] = sum of x[k] * (s * q[k, n] + m) = sum of (x[k] * s) * q[k, n], and of x[k] * m

A group is 16 bytes of weights, one load of one thread, and 4 bytes of scales. Byte j holds column
j of the group in its low half and column j + 16 in its high half. So what the group
shares is computed once for 32 weights. Tiles are [rows, bytes]: in three dimensions, Triton 3.6
lays threads along the rows, which scatters the loads.

Converting integers is slow on GPUs. The float32 with the bits 0x3F800000 is 1, and q in the top 4
bits of its mantissa makes it 1 + q / 16. A shift and a mask turn four weights into the bytes
0x80 + 8 q, and for each of them one permutation of bytes makes the float. The scales absorb the
factor and the offset: (16 x s) * (1 + q / 16) + (x m - 16 x s).
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_gemv import PTX, WARPS, _entries, _select_kernel, _workspace, supports_pdl

GROUP = 32  # columns that share a scale and a minimum; the kernel's 16 is a group's bytes


@triton.jit
def _halves(w):
    """Bytes -> 1 + q / 16 as float32, of their low and of their high four bits."""
    if PTX:
        # prmt.b32 takes bytes 0, 0, one of t, 0x3F: digits 4 and 7 are of 0x3F000000, 0 to 3 of t.
        low, high = tl.inline_asm_elementwise("""{
            .reg .b32 t, u;
            shl.b32 t, $8, 3; lop3.b32 t, t, 0x78787878, 0x80808080, 0xEA;
            shr.b32 u, $8, 1; lop3.b32 u, u, 0x78787878, 0x80808080, 0xEA;
            prmt.b32 $0, t, 0x3F000000, 0x7044; prmt.b32 $1, t, 0x3F000000, 0x7144;
            prmt.b32 $2, t, 0x3F000000, 0x7244; prmt.b32 $3, t, 0x3F000000, 0x7344;
            prmt.b32 $4, u, 0x3F000000, 0x7044; prmt.b32 $5, u, 0x3F000000, 0x7144;
            prmt.b32 $6, u, 0x3F000000, 0x7244; prmt.b32 $7, u, 0x3F000000, 0x7344;
            }""", "=r,=r,=r,=r,=r,=r,=r,=r,r", [w], dtype=(tl.int32, tl.int32), is_pure=True,
            pack=4)
        return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    else:
        w = w.to(tl.int32)
        return 1 + (w & 15).to(tl.float32) / 16, 1 + (w >> 4).to(tl.float32) / 16


@triton.jit
def _sum_rows_kernel(rows_ptr, values_ptr, counts_ptr, w_ptr, groups_ptr, out_ptr, bias_ptr,
                     residual_ptr, sums_ptr, finished_ptr, K: tl.constexpr, N: tl.constexpr,
                     END0: tl.constexpr, END1: tl.constexpr, CHUNK: tl.constexpr,
                     SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     ROWS_AT_ONCE: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over one list; segments as in sparse_gemv.py."""
    program, part = tl.program_id(0), tl.program_id(1)
    tiles0: tl.constexpr = (END0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = tiles0 + (END1 - END0 + BLOCK_N - 1) // BLOCK_N
    segment = (program >= tiles0).to(tl.int32) + (program >= tiles1).to(tl.int32)
    tile = program - tl.where(segment == 0, 0, tl.where(segment == 1, tiles0, tiles1))
    start = tl.where(segment == 0, 0, tl.where(segment == 1, END0, END1))
    end = tl.where(segment == 0, END0, tl.where(segment == 1, END1, N))
    n = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    GROUPS: tl.constexpr = BLOCK_N // 32
    ROUNDS: tl.constexpr = BLOCK_K // ROWS_AT_ONCE
    group_start = (start + tile * BLOCK_N) // 32
    group = group_start + tl.arange(0, GROUPS)
    byte = tl.multiple_of(group_start * 16, 16) + tl.arange(0, BLOCK_N // 2)
    item = segment * SPLITS + part
    rows_ptr += item * CHUNK
    values_ptr += item * CHUNK

    if PDL:
        gdc_wait()
    count = tl.load(counts_ptr + item)
    i = tl.arange(0, BLOCK_K)
    low_sum = tl.zeros([ROWS_AT_ONCE, BLOCK_N // 2], tl.float32)
    high_sum = tl.zeros([ROWS_AT_ONCE, BLOCK_N // 2], tl.float32)
    k, x = _entries(rows_ptr, values_ptr, i, count, CHUNK)
    for first in tl.range(0, count, BLOCK_K, num_stages=1):
        next_k, next_x = _entries(rows_ptr, values_ptr, first + BLOCK_K + i, count, CHUNK)
        k = k.to(tl.int64) if K * N >= 2 ** 31 else k
        rows = (first + i < count)[:, None]
        w = tl.load(w_ptr + k[:, None] * (N // 2) + byte[None, :],
                    mask=rows & (byte // 16 * 32 < end)[None, :], other=0,
                    eviction_policy="evict_first")
        pair = tl.load(groups_ptr + k[:, None] * (N // 32) + group[None, :],
                       mask=rows & (group * 32 < end)[None, :], other=0)  # two bfloat16 at once
        scale = 16 * x[:, None] * (pair << 16).to(tl.float32, bitcast=True)
        minimum = x[:, None] * (pair & -65536).to(tl.float32, bitcast=True) - scale
        # A thread holds the 16 bytes of a group: give each of them the group's numbers.
        shape: tl.constexpr = [BLOCK_K, GROUPS, 16]
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], shape), [BLOCK_K, BLOCK_N // 2])
        minimum = tl.reshape(tl.broadcast_to(minimum[:, :, None], shape), [BLOCK_K, BLOCK_N // 2])
        low, high = _halves(w)
        low, high = low * scale + minimum, high * scale + minimum
        low_sum += tl.sum(tl.reshape(low, [ROUNDS, ROWS_AT_ONCE, BLOCK_N // 2]), axis=0)
        high_sum += tl.sum(tl.reshape(high, [ROUNDS, ROWS_AT_ONCE, BLOCK_N // 2]), axis=0)
        k, x = next_k, next_x

    if PDL:
        gdc_launch_dependents()
    both = tl.join(tl.sum(low_sum, axis=0), tl.sum(high_sum, axis=0))  # [bytes, halves]
    both = tl.permute(tl.reshape(both, [GROUPS, 16, 2]), (0, 2, 1))
    y = tl.reshape(both, [BLOCK_N])
    if SPLITS > 1:
        tl.store(sums_ptr + part * N + n, y, mask=n < end)
        tl.debug_barrier()  # all threads have stored
        if tl.atomic_add(finished_ptr + program, 1, sem="acq_rel") < SPLITS - 1:
            return
        y = tl.zeros([BLOCK_N], tl.float32)
        for other in tl.static_range(SPLITS):
            y += tl.load(sums_ptr + other * N + n, mask=n < end, other=0.0, cache_modifier=".cg")
        tl.store(finished_ptr + program, 0)  # for the next launch
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < end)


def _launch_shape(k, n):
    """(BLOCK_N, BLOCK_K, SPLITS): tiles of 64 bytes a row, split as in sparse_gemv.py."""
    block_n = min(128, triton.next_power_of_2(n))
    splits = max(1, min(16, round(768 / triton.cdiv(n, block_n)), k // 256))
    block_k = min(128, max(32, triton.next_power_of_2(triton.cdiv(k, splits))))
    return block_n, block_k, splits


def int4_gemv(x, w_t, thresholds, *, ends, scale, out, bias=None, norm=None, swiglu=False,
              residual=None, kept=None):
    """`sparse_gemv` on a GPU for weights that int4.py made; the same arguments but for these.

    w_t:        uint8 [K, N / 2]
    thresholds: float32 tensor, one for each of the matrices
    ends:       of the matrices, multiples of 32
    scale:      bfloat16 [K, N / 32, 2], scale and minimum of each group

    Raises ValueError if w_t, scale or ends do not fit each other and x.
    """
    k, n = w_t.shape[0], ends[-1]
    if (x.numel() != k * (1 + swiglu) or tuple(w_t.shape) != (k, n // 2)
            or w_t.dtype != torch.uint8 or tuple(scale.shape) != (k, n // GROUP, 2)
            or scale.dtype != torch.bfloat16 or any(end % GROUP for end in ends)
            or not (w_t.is_contiguous() and scale.is_contiguous())):
        raise ValueError(
            f"int4_gemv: x {tuple(x.shape)}, w_t {w_t.dtype} {tuple(w_t.shape)}, scale "
            f"{scale.dtype} {tuple(scale.shape)} and ends {ends} do not fit each other; expected "
            "uint8 [K, N / 2], bfloat16 [K, N / 32, 2] and multiples of 32")
    segments = len(ends)
    end0, end1, _ = (*ends, n, n)[:3]
    block_n, block_k, splits = _launch_shape(k, n)
    chunk = triton.cdiv(k, splits)
    tiles = sum(triton.cdiv(width, block_n) for width in (end0, end1 - end0, n - end1))
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    pdl = supports_pdl(x.device)
    launch = {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    chunk_padded, k_padded = triton.next_power_of_2(chunk), triton.next_power_of_2(k)
    entries = max(chunk_padded, k_padded if norm is not None else 0)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        rows, values, counts, sums, finished = _workspace(
            x.device, x.dtype, segments * splits, chunk, n, splits, tiles)
        _select_kernel[(segments, splits)](
            x, norm_weight, rows, values, counts, kept, thresholds, eps, K=k, CHUNK=chunk,
            SWIGLU=swiglu, CHUNK_PADDED=chunk_padded, K_PADDED=k_padded,
            num_warps=min(16, max(1, entries // 256)), **launch)
        _sum_rows_kernel[(tiles, splits)](
            rows, values, counts, w_t, scale.view(torch.int32), out, bias, residual, sums,
            finished, K=k, N=n, END0=end0, END1=end1, CHUNK=chunk, SPLITS=splits, BLOCK_N=block_n,
            BLOCK_K=block_k, ROWS_AT_ONCE=min(block_k, WARPS * 32 * GROUP // block_n),
            num_warps=WARPS, **launch)
    return out

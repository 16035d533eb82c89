"""y = W x on a GPU's tensor cores: dense products in bfloat16, and all products of 4-bit weights.

Where every row is read, or a row has few bytes, instructions cost as much time as memory. Tensor
cores need few: one instruction multiplies 128 weights by 16 vectors. One vector is x. What to do
with the other 15?

**bfloat16.** Nothing: all 16 rows are x. The gain is on the way: weights go through shared memory
(`num_stages`: Triton asks for the next tiles while this one is multiplied), which holds more of
them on their way than registers do.

**4 bits.** A group of 32 weights of one row shares a scale s and a minimum m, so that a dropped
row is dropped with its scales. A weight is s * q + m, q from 0 to 15:

    y[n] = sum of (x[k] * s) * q[k, n], and of x[k] * m

The tensor cores multiply the q. Each group needs x * s of its own, and in bfloat16 this number is
cut into a high and a low part (into four, if x is float32). So 8 groups of 2 parts are the 16
rows, and the sums of a column are those in the two rows of its group.

Byte j of a group holds column j in its low half and column j + 16 in its high half. A tile is
int32: eight columns in one number. To convert integers is slow on GPUs. But the bfloat16 with the
bits q is q * 2**-133, for all q up to 255: below 2**-125, floats are evenly spaced. So one "and"
makes two floats, and x * s absorbs the factor.

Which rows: all of them, or those of the lists that sparse_gemv.py's select kernel makes. A dense
product asks for its first weights before the kernel in front has written x (dense_gemv.py explains
why). It leaves RMSNorm's division to the end: each program squares the x of its rows, and the last
one adds up. Split-K and the other fusions are those of sparse_gemv.py.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu.dense_gemv import _add_splits, _count_every_row, _is_not_last, _store
from sparse_gemv import PTX, _entries, _select_kernel, supports_pdl
from sparse_gemv import _workspace as _lists

GROUP = 32  # columns that share a scale and a minimum
# The tiny floats times these are ordinary numbers. The interpreter takes q itself.
UP = tl.constexpr(2.0 ** 80 if PTX.value else 1.0)
DOWN = tl.constexpr(2.0 ** 53 if PTX.value else 1.0)


@triton.jit
def _digits(w):
    """int32 -> its eight 4-bit numbers in bfloat16: q * 2**-133, every other one times 16."""
    if PTX:
        # prmt.b32 puts byte i of two rows into bits 0-7 and 16-23: two bfloat16, after the "and".
        return tl.inline_asm_elementwise("""{
            .reg .b32 t;
            prmt.b32 t, $8, $9, 0x5410; and.b32 $0, t, 0x000F000F; and.b32 $1, t, 0x00F000F0;
            prmt.b32 t, $8, $9, 0x6521; and.b32 $2, t, 0x000F000F; and.b32 $3, t, 0x00F000F0;
            prmt.b32 t, $8, $9, 0x7632; and.b32 $4, t, 0x000F000F; and.b32 $5, t, 0x00F000F0;
            prmt.b32 t, $8, $9, 0x7773; and.b32 $6, t, 0x000F000F; and.b32 $7, t, 0x00F000F0;
            }""", "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [w], dtype=(tl.bfloat16,) * 8, is_pure=True,
            pack=2)
    else:
        return ((w & 15).to(tl.float32), (w & 240).to(tl.float32),
                (w >> 8 & 15).to(tl.float32), (w >> 8 & 240).to(tl.float32),
                (w >> 16 & 15).to(tl.float32), (w >> 16 & 240).to(tl.float32),
                (w >> 24 & 15).to(tl.float32), (w >> 24 & 240).to(tl.float32))


@triton.jit
def _wait():
    """`gdc_wait` in a loop. Newer Tritons do not pipeline loops that hold their own."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32,
                              is_pure=False, pack=1)


@triton.jit
def _dot(a, b, total):
    """total + a @ b, a [16, BLOCK_K] in bfloat16, total in float32"""
    if PTX:
        return tl.dot(a, b, total)
    else:  # the interpreter cannot multiply bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


@triton.jit
def _sixteen_rows(x, BLOCK_K: tl.constexpr):
    """x [BLOCK_K] -> [16, BLOCK_K], each row x. The join is the form that Triton compiles best."""
    eight = tl.broadcast_to(x[:, None], [BLOCK_K, 8])
    return tl.trans(tl.reshape(tl.join(eight, eight), [BLOCK_K, 16]))


@triton.jit
def _parts(x, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """x float32 [BLOCK_K, groups] -> bfloat16 [groups * PARTS, BLOCK_K]; PARTS add up to x."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    low = x.to(tl.bfloat16)
    parts = tl.join(high, low)
    if PARTS == 4:
        x -= low.to(tl.float32)
        third = x.to(tl.bfloat16)
        fourth = (x - third.to(tl.float32)).to(tl.bfloat16)
        parts = tl.join(parts, tl.join(third, fourth))
    return tl.trans(tl.reshape(parts, [BLOCK_K, 16]))


@triton.jit
def _own_rows(total, PARTS: tl.constexpr, WORDS: tl.constexpr):
    """Sums [16, WORDS] -> [WORDS]: of each word, the rows of its group."""
    own = (tl.arange(0, 16) // PARTS)[:, None] == (tl.arange(0, WORDS) // 4)[None, :]
    return tl.sum(tl.where(own, total, 0.0), axis=0)


@triton.jit
def _four_bytes(t0, t1, t2, t3, PARTS: tl.constexpr, WORDS: tl.constexpr):
    """The sums of a word's bytes 0 to 3 -> [WORDS, i, j], byte 2 j + i."""
    return tl.join(tl.join(_own_rows(t0, PARTS, WORDS), _own_rows(t1, PARTS, WORDS)),
                   tl.join(_own_rows(t2, PARTS, WORDS), _own_rows(t3, PARTS, WORDS)))


@triton.jit(do_not_specialize_on_alignment=["kept_ptr"])
def _kernel(x_ptr, norm_ptr, rows_ptr, values_ptr, counts_ptr, w_ptr, groups_ptr, out_ptr, bias_ptr,
            residual_ptr, sums_ptr, squares_ptr, finished_ptr, kept_ptr, eps, K: tl.constexpr,
            N: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, SEGMENTS: tl.constexpr,
            CHUNK: tl.constexpr, SPLITS: tl.constexpr, SWIGLU: tl.constexpr, PARTS: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over one list, or over CHUNK rows if there is none."""
    LISTS: tl.constexpr = rows_ptr is not None
    INT4: tl.constexpr = groups_ptr is not None
    program, part = tl.program_id(0), tl.program_id(1)
    tiles0: tl.constexpr = (END0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = tiles0 + (END1 - END0 + BLOCK_N - 1) // BLOCK_N
    segment = (program >= tiles0).to(tl.int32) + (program >= tiles1).to(tl.int32)
    tile = program - tl.where(segment == 0, 0, tl.where(segment == 1, tiles0, tiles1))
    start = tl.where(segment == 0, 0, tl.where(segment == 1, END0, END1)) + tile * BLOCK_N
    end = tl.where(segment == 0, END0, tl.where(segment == 1, END1, N))
    FULL_TILES: tl.constexpr = END0 % BLOCK_N == 0 and END1 % BLOCK_N == 0 and N % BLOCK_N == 0
    n = start + tl.arange(0, BLOCK_N)
    GROUPS: tl.constexpr = BLOCK_N // 32
    WORDS: tl.constexpr = BLOCK_N // 8  # int32 of a row of 4-bit weights
    group = start // 32 + tl.arange(0, GROUPS)
    word = tl.multiple_of(start // 8, 4) + tl.arange(0, WORDS)
    if LISTS:
        item = segment * SPLITS + part
        rows_ptr += item * CHUNK
        values_ptr += item * CHUNK
        if PDL:
            gdc_wait()
        first, last = 0, tl.load(counts_ptr + item)
    else:
        first, last = part * CHUNK, tl.minimum((part + 1) * CHUNK, K)
    i = tl.arange(0, BLOCK_K)
    squares = tl.zeros([BLOCK_K], tl.float32)
    if INT4:
        minima = tl.zeros([BLOCK_K, GROUPS], tl.float32)
        none = tl.zeros([16, WORDS], tl.float32)  # t0 ... t7: of a word's eight digits
        t0, t1, t2, t3, t4, t5, t6, t7 = none, none, none, none, none, none, none, none
    else:
        total = tl.zeros([16, BLOCK_N], tl.float32)
    for at in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        inside = at + i < last
        if LISTS:
            k, x = _entries(rows_ptr, values_ptr, at + i, last, CHUNK)
        else:
            k = at + i
        row = (k.to(tl.int64) if K * N >= 2 ** 31 else k)[:, None]
        if INT4:
            mask, group_mask = inside[:, None], inside[:, None]
            if not FULL_TILES:
                mask &= (word // 4 * 32 < end)[None, :]  # alike for the words of a group
                group_mask &= (group * 32 < end)[None, :]
            w = tl.load(w_ptr + row * (N // 8) + word[None, :], mask=mask, other=0)
            pair = tl.load(groups_ptr + row * (N // 32) + group[None, :], mask=group_mask, other=0)
        else:
            mask = inside[:, None]
            if not FULL_TILES:
                mask &= (n < end)[None, :]
            w = tl.load(w_ptr + row * N + n[None, :], mask=mask, other=0.0)
        if not LISTS:
            if PDL:  # Behind the loads: those of the first tiles are issued before the loop begins.
                _wait()
            x = tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)
            if SWIGLU:
                up = tl.load(x_ptr + K + k, mask=inside, other=0.0).to(tl.float32)
                x = x / (1 + tl.exp(-x)) * up
            if norm_ptr is not None:
                squares += x * x
                x *= tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
        if INT4:  # a pair holds scale and minimum, bfloat16 both: a float32's upper half
            minima += x[:, None] * (pair & -65536).to(tl.float32, bitcast=True)
            x_scaled = (x * UP)[:, None] * (pair << 16).to(tl.float32, bitcast=True)
            a = _parts(x_scaled, PARTS, BLOCK_K)
            q0, q1, q2, q3, q4, q5, q6, q7 = _digits(w)
            t0, t1, t2, t3 = _dot(a, q0, t0), _dot(a, q1, t1), _dot(a, q2, t2), _dot(a, q3, t3)
            t4, t5, t6, t7 = _dot(a, q4, t4), _dot(a, q5, t5), _dot(a, q6, t6), _dot(a, q7, t7)
        else:
            total = _dot(_sixteen_rows(x.to(tl.bfloat16), BLOCK_K), w, total)

    if PDL:  # Not earlier: waiting programs of the next kernel would fill multiprocessors unevenly.
        gdc_launch_dependents()
    if INT4:
        low = _four_bytes(t0, t2, t4, t6, PARTS, WORDS)  # [WORDS, 2, 2]
        high = _four_bytes(t1, t3, t5, t7, PARTS, WORDS) / 16
        y = tl.reshape(tl.join(low, high), [GROUPS, 4, 2, 2, 2])  # group, word, i, j, half
        y = tl.reshape(tl.permute(y, (0, 4, 1, 3, 2)), [GROUPS, 32])
        y = tl.reshape(y * DOWN + tl.sum(minima, axis=0)[:, None], [BLOCK_N])
    else:
        y = tl.max(total, axis=0)  # of equals
    square = tl.sum(squares)
    if kept_ptr is not None and not LISTS:  # the select kernel counts those of the lists
        if (program == 0) & (part == 0):
            _count_every_row(kept_ptr, SEGMENTS, K)
    if SPLITS > 1:
        if norm_ptr is not None:
            tl.store(squares_ptr + program * SPLITS + part, square)
        if _is_not_last(y, sums_ptr + part * N + n, n < end, finished_ptr + program, SPLITS):
            return
        y = _add_splits(sums_ptr + n, n < end, finished_ptr + program, N, SPLITS)
        if norm_ptr is not None:
            square = 0.0
            for other in tl.static_range(SPLITS):
                square += tl.load(squares_ptr + program * SPLITS + other, cache_modifier=".cg")
    if norm_ptr is not None:
        y *= tl.rsqrt(square / K + eps)
    _store(y, n, end, out_ptr, bias_ptr, residual_ptr)


@functools.lru_cache(maxsize=None)
def _workspace(device, n, splits, n_programs):
    """Sums, sums of squares, splits finished so far."""
    return (torch.empty(splits * n, dtype=torch.float32, device=device),
            torch.empty(splits * n_programs, dtype=torch.float32, device=device),
            torch.zeros(n_programs, dtype=torch.int32, device=device))


def _check_int4(x, w_t, ends, scale, swiglu):
    k, n = w_t.shape[0], ends[-1]
    if (x.numel() != k * (1 + swiglu) or tuple(w_t.shape) != (k, n // 2)
            or tuple(scale.shape) != (k, n // GROUP, 2)
            or scale.dtype != torch.bfloat16 or any(end % GROUP for end in ends)
            or not (w_t.is_contiguous() and scale.is_contiguous())):
        raise ValueError(
            f"tensor_gemv: x {tuple(x.shape)}, w_t {w_t.dtype} {tuple(w_t.shape)}, scale "
            f"{scale.dtype} {tuple(scale.shape)} and ends {ends} do not fit each other; expected "
            "uint8 [K, N / 2], bfloat16 [K, N / 32, 2] and multiples of 32")


def tensor_gemv(x, w_t, thresholds, out, *, ends=None, scale=None, bias=None, norm=None,
                swiglu=False, residual=None, kept=None):
    """`sparse_gemv` on tensor cores, on a GPU or in the interpreter; the same arguments but for:

    x:          bfloat16; with 4-bit weights of any dtype
    w_t:        bfloat16 [K, N], or 4-bit weights as quantize.py makes them, uint8 [K, N / 2]
    thresholds: None reads every row. With 4-bit weights also a float32 tensor, one for each of
                the matrices.
    ends:       with 4-bit weights, multiples of 32
    scale:      with 4-bit weights, bfloat16 [K, N / 32, 2]: scale and minimum of each group

    `out` may be `residual` itself. The same inputs give the same bits. Call it once with these
    shapes before capturing a CUDA graph. The kernel in front must not write w_t: it is read before
    that kernel ends. With 4-bit weights, x times a scale must stay below 2**47. Raises ValueError
    if 4-bit weights, scale or ends do not fit each other and x; else nothing is checked.
    """
    k, n = w_t.shape[0], ends[-1] if ends else w_t.shape[1]
    ends = tuple(ends or (n,))
    int4, parts, groups = w_t.dtype == torch.uint8, 4 if x.dtype == torch.float32 else 2, None
    block_n, block_k, warps, programs, most = 128, 64, 4, 528, 32
    if int4:
        _check_int4(x, w_t, ends, scale, swiglu)
        w_t, groups, block_n = w_t.view(torch.int32), scale.view(torch.int32), 16 // parts * GROUP
        if thresholds is not None:  # at 50% a list is short: smaller tiles, more programs
            block_k, warps, programs, most = 32, 2, 1040, 64
    # Chosen by timing whole 7B models on an H100. More programs than 132 multiprocessors hold at
    # once would leave some for a second turn: a tenth slower.
    end0, end1 = (*ends, n, n)[:2] if thresholds is not None else (n, n)
    tiles = sum(triton.cdiv(width, block_n) for width in (end0, end1 - end0, n - end1))
    splits = max(1, min(most, programs // tiles, k // 128))
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    pdl = supports_pdl(x.device)
    launch = {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if thresholds is None:
            chunk = triton.cdiv(triton.cdiv(k, splits), block_k) * block_k
            splits = triton.cdiv(k, chunk)  # each program has rows: it waits for x in its loop
            rows = values = counts = None
            sums, squares, finished = _workspace(x.device, n, splits, tiles)
        else:
            chunk = triton.cdiv(k, splits)
            chunk_padded, k_padded = triton.next_power_of_2(chunk), triton.next_power_of_2(k)
            entries = max(chunk_padded, k_padded if norm is not None else 0)
            rows, values, counts, sums, finished = _lists(
                x.device, x.dtype, len(ends) * splits, chunk, n, splits, tiles)
            _select_kernel[(len(ends), splits)](
                x, norm_weight, rows, values, counts, kept, thresholds, eps, K=k, CHUNK=chunk,
                SWIGLU=swiglu, CHUNK_PADDED=chunk_padded, K_PADDED=k_padded,
                num_warps=min(16, max(1, entries // 256)), **launch)
            squares = norm_weight = None  # what the lists hold is normalised
        _kernel[(tiles, splits)](
            x, norm_weight, rows, values, counts, w_t, groups, out, bias, residual, sums, squares,
            finished, kept, eps, K=k, N=n, END0=end0, END1=end1, SEGMENTS=len(ends), CHUNK=chunk,
            SPLITS=splits, SWIGLU=swiglu, PARTS=parts, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=3,
            num_warps=warps, **launch)
    return out

"""y = W x of 4-bit weights, on a GPU's tensor cores: every row, or those of lists.

A group of 32 weights of one row shares a scale s and a minimum m, so that a dropped row is dropped
with its scales. A weight is s * q + m, q from 0 to 15:

    y[n] = sum of (x[k] * s) * q[k, n], and of x[k] * m

A row has few bytes here, so instructions cost as much time as memory. Tensor cores need few: one
instruction multiplies 128 numbers q by 16 vectors. Each group needs x * s of its own, and in
bfloat16 this number is cut into a high and a low part (into four, if x is float32). So 8 groups of
2 parts are the 16 vectors, and the sums of a column are those in the two rows of its group.

Byte j of a group holds column j in its low half and column j + 16 in its high half. A tile is
int32: eight columns in one number. Converting integers is slow on GPUs. But the bfloat16 with the
bits q is q * 2**-133, for all q up to 255: below 2**-125, floats are evenly spaced. So one "and"
makes two floats, and x * s absorbs the factor.

tensor_cores.py explains when x is read, and what RMSNorm leaves to the end; lists.py has select.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu.lists import select
from gpu.parts import count_every_row, cut_tiles, find_tile
from gpu.tensor_cores import dot, late_x, split_rows
from quantize import GROUP
from sparse_gemv import PTX, finish, launch_options, list_entries, workspace

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


@triton.jit
def _columns(low, high, minima, GROUPS: tl.constexpr):
    """Sums of low and high digits [WORDS, 2, 2], and of minima -> those of the columns in order."""
    y = tl.reshape(tl.join(low, high / 16), [GROUPS, 4, 2, 2, 2])  # group, word, i, j, half
    y = tl.reshape(tl.permute(y, (0, 4, 1, 3, 2)), [GROUPS, 32])
    return tl.reshape(y * DOWN + tl.sum(minima, axis=0)[:, None], [GROUPS * 32])


@triton.jit(do_not_specialize_on_alignment=["kept_ptr"])
def _four_bit_kernel(x_ptr, norm_ptr, rows_ptr, values_ptr, counts_ptr, w_ptr, groups_ptr, out_ptr,
                     bias_ptr, residual_ptr, sums_ptr, finished_ptr, kept_ptr, eps,
                     K: tl.constexpr, N: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr,
                     MATRICES: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
                     SWIGLU: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over one list, or over CHUNK rows if there is none."""
    LISTS: tl.constexpr = rows_ptr is not None
    GROUPS: tl.constexpr = BLOCK_N // 32
    WORDS: tl.constexpr = BLOCK_N // 8  # int32 of a row
    chunk = tl.program_id(1)
    matrix, start, end = find_tile(END0, END1, N, BLOCK_N)
    group = start // 32 + tl.arange(0, GROUPS)
    word = tl.multiple_of(start // 8, 4) + tl.arange(0, WORDS)
    if LISTS:
        item = matrix * SPLITS + chunk
        if PDL:
            gdc_wait()
        first, last = 0, tl.load(counts_ptr + item)
    else:
        first, last = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, K)
    i = tl.arange(0, BLOCK_K)
    squares = tl.zeros([BLOCK_K], tl.float32)
    minima = tl.zeros([BLOCK_K, GROUPS], tl.float32)
    none = tl.zeros([16, WORDS], tl.float32)  # t0 ... t7: of a word's eight digits
    t0, t1, t2, t3, t4, t5, t6, t7 = none, none, none, none, none, none, none, none
    for at in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        k, inside = at + i, at + i < last
        if LISTS:
            k, x = list_entries(rows_ptr + item * CHUNK, values_ptr + item * CHUNK, k, last, CHUNK)
        mask, group_mask = inside[:, None], inside[:, None]
        if END0 % BLOCK_N != 0 or END1 % BLOCK_N != 0 or N % BLOCK_N != 0:
            mask &= (word // 4 * 32 < end)[None, :]  # alike for the words of a group
            group_mask &= (group * 32 < end)[None, :]
        row = (k.to(tl.int64) if K * N >= 2 ** 31 else k)[:, None]
        w = tl.load(w_ptr + row * (N // 8) + word[None, :], mask=mask, other=0)
        pair = tl.load(groups_ptr + row * (N // 32) + group[None, :], mask=group_mask, other=0)
        if not LISTS:
            x, squares = late_x(x_ptr, norm_ptr, k, inside, squares, K, SWIGLU, PDL)
        # A pair holds scale and minimum, bfloat16 both: a float32's upper half.
        minima += x[:, None] * (pair & -65536).to(tl.float32, bitcast=True)
        a = _parts((x * UP)[:, None] * (pair << 16).to(tl.float32, bitcast=True), PARTS, BLOCK_K)
        q0, q1, q2, q3, q4, q5, q6, q7 = _digits(w)
        t0, t1, t2, t3 = dot(a, q0, t0), dot(a, q1, t1), dot(a, q2, t2), dot(a, q3, t3)
        t4, t5, t6, t7 = dot(a, q4, t4), dot(a, q5, t5), dot(a, q6, t6), dot(a, q7, t7)

    if PDL:  # Not earlier: waiting programs of the next kernel would fill multiprocessors unevenly.
        gdc_launch_dependents()
    y = _columns(_four_bytes(t0, t2, t4, t6, PARTS, WORDS),
                 _four_bytes(t1, t3, t5, t7, PARTS, WORDS), minima, GROUPS)
    if kept_ptr is not None and not LISTS:  # select counts those of the lists
        count_every_row(kept_ptr, MATRICES, K)
    finish(y, start + tl.arange(0, BLOCK_N), end, out_ptr, None, bias_ptr, residual_ptr, sums_ptr,
           finished_ptr, N, SPLITS, tl.sum(squares) if norm_ptr is not None else None, K, eps)


def product_of_four_bits(x, w_t, thresholds, out, *, scale, ends=None, bias=None, norm=None,
                         swiglu=False, residual=None, kept=None):
    """`product_by_lists` of 4-bit weights, on tensor cores; the same arguments but for:

    w_t:        uint8 [K, N / 2], as quantize.py makes them
    thresholds: None reads every row, without lists
    scale:      bfloat16 [K, N / 32, 2]: scale and minimum of each group
    ends:       multiples of 32, as quantize.can_be_int4 ensures

    The kernel before must not write w_t: it is read before that kernel ends. x times a scale must
    stay below 2**47.
    """
    k, ends = w_t.shape[0], tuple(ends or (w_t.shape[1] * 2,))
    n, parts = ends[-1], 4 if x.dtype == torch.float32 else 2
    block_n, weight, eps = 16 // parts * GROUP, *(norm or (None, 0.0))
    # Chosen by timing whole 7B models on an H100. At 50%, a list is short: smaller tiles, more
    # programs.
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if thresholds is None:
            block_k, warps, (end0, end1, tiles) = 64, 4, cut_tiles((n,), block_n)
            chunk, splits = split_rows(k, tiles, block_k, programs=528, most=32)
            lists = None, None, None
        else:
            block_k, warps, (end0, end1, tiles) = 32, 2, cut_tiles(ends, block_n)
            splits = max(1, min(64, 1040 // tiles, k // 128))
            lists, chunk = select(x, thresholds, splits, norm, swiglu, kept)
            weight = None  # what the lists hold is normalised
        sums = workspace(x.device, (splits * (n + tiles), torch.float32), (tiles, torch.int32))
        _four_bit_kernel[(tiles, splits)](
            x, weight, *lists, w_t.view(torch.int32), scale.view(torch.int32), out, bias, residual,
            *sums, kept, eps, K=k, N=n, END0=end0, END1=end1, MATRICES=len(ends), CHUNK=chunk,
            SPLITS=splits, SWIGLU=swiglu, PARTS=parts, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=3,
            num_warps=warps, **launch_options(x.device))
    return out

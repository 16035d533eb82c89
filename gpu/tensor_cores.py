"""y = W x on a GPU's tensor cores: dense products in bfloat16.

Where every row is read, instructions cost as much time as memory. Tensor cores need few: one
instruction multiplies 128 weights by 16 vectors. Here all 16 are x. The gain is on the way:
weights go through shared memory (`num_stages`: Triton loads the next tiles while this one is
multiplied), which holds more of them on their way than registers do.

A program starts to load its first weights before the kernel before it has written x (one_kernel.py
explains why). RMSNorm's division is left to the end: each program squares the x of its rows, and
the last one adds up. sparse_gemv.py explains split-K.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from gpu.parts import count_every_row, find_tile, load_norm, swiglu
from sparse_gemv import PTX, finish, launch_options, workspace


@triton.jit
def _wait():
    """`gdc_wait` in a loop. Newer Tritons do not pipeline loops that hold their own."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32,
                              is_pure=False, pack=1)


@triton.jit
def late_x(x_ptr, norm_ptr, k, inside, squares, K: tl.constexpr, SWIGLU: tl.constexpr,
           PDL: tl.constexpr):
    """x[k] in float32, and x * x added to `squares`; x is to be divided by its RMS at the end.

    To be called in a loop, after the loads of weights: those of the first tiles are issued before
    the loop begins, and so before the wait.
    """
    if PDL:
        _wait()
    x = tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        x = swiglu(x, tl.load(x_ptr + K + k, mask=inside, other=0.0).to(tl.float32))
    if norm_ptr is not None:
        squares += x * x
        x *= load_norm(norm_ptr, k, inside)
    return x, squares


@triton.jit
def dot(a, b, total):
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


@triton.jit(do_not_specialize_on_alignment=["kept_ptr"])
def _tensor_core_kernel(x_ptr, norm_ptr, w_ptr, out_ptr, bias_ptr, residual_ptr, sums_ptr,
                        finished_ptr, kept_ptr, eps, K: tl.constexpr, N: tl.constexpr,
                        MATRICES: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
                        SWIGLU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                        STAGES: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over CHUNK rows."""
    # All rows are read, so this is one matrix. Written as program_id * BLOCK_N, ptxas, which makes
    # machine code of PTX, orders the loop's instructions differently from what was timed.
    _, start, end = find_tile(N, N, N, BLOCK_N)
    chunk, n = tl.program_id(1), start + tl.arange(0, BLOCK_N)
    first, last = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, K)
    i = tl.arange(0, BLOCK_K)
    squares = tl.zeros([BLOCK_K], tl.float32)
    total = tl.zeros([16, BLOCK_N], tl.float32)
    for at in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        k, inside = at + i, at + i < last
        mask = inside[:, None]
        if N % BLOCK_N != 0:
            mask &= (n < end)[None, :]
        row = (k.to(tl.int64) if K * N >= 2 ** 31 else k)[:, None]
        w = tl.load(w_ptr + row * N + n[None, :], mask=mask, other=0.0)
        x, squares = late_x(x_ptr, norm_ptr, k, inside, squares, K, SWIGLU, PDL)
        total = dot(_sixteen_rows(x.to(tl.bfloat16), BLOCK_K), w, total)

    if PDL:  # Not earlier: waiting programs of the next kernel would fill multiprocessors unevenly.
        gdc_launch_dependents()
    y = tl.max(total, axis=0)  # of equals
    square = tl.sum(squares) if norm_ptr is not None else None
    if kept_ptr is not None:
        count_every_row(kept_ptr, MATRICES, K)
    finish(y, n, end, out_ptr, None, bias_ptr, residual_ptr, sums_ptr, finished_ptr, N, SPLITS,
           square, K, eps)


def split_rows(k, tiles, block_k, programs, most):
    """(rows of a program, splits) so that about so many programs read w_t [k, ...].

    More than 132 multiprocessors hold at once would leave some for a second turn: a tenth slower.
    Each program has rows: it waits for x in its loop, and must not finish before x is there.
    """
    splits = max(1, min(most, programs // tiles, k // 128))
    chunk = triton.cdiv(triton.cdiv(k, splits), block_k) * block_k
    return chunk, triton.cdiv(k, chunk)


def product_on_tensor_cores(x, w_t, out, *, ends=None, bias=None, norm=None, swiglu=False,
                            residual=None, kept=None):
    """`product_by_lists` of bfloat16 x and w_t that keeps every row, on tensor cores.

    The kernel before must not write w_t: it is read before that kernel ends.
    """
    (k, n), block_n, block_k = w_t.shape, 128, 64
    # Chosen by timing whole 7B models on an H100, as `programs` and `most`.
    tiles = triton.cdiv(n, block_n)
    chunk, splits = split_rows(k, tiles, block_k, programs=528, most=32)
    weight, eps = norm or (None, 0.0)
    sums = workspace(x.device, (splits * (n + tiles), torch.float32), (tiles, torch.int32))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _tensor_core_kernel[(tiles, splits)](
            x, weight, w_t, out, bias, residual, *sums, kept, eps, K=k, N=n,
            MATRICES=len(ends or (n,)), CHUNK=chunk, SPLITS=splits, SWIGLU=swiglu, BLOCK_N=block_n,
            BLOCK_K=block_k, STAGES=3, num_warps=4, **launch_options(x.device))
    return out

"""Parts that several kernels share: what is fused before a product, and matrices side by side.

sparse_gemv.py has the others, and explains them: lists, splits and what is fused after a product.
"""

import triton
import triton.language as tl


@triton.jit
def load_norm(norm_ptr, k, inside):
    """RMSNorm's weights of x[k] in float32; 1 if there is no norm."""
    if norm_ptr is None:
        return 1.0
    else:
        return tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(x_ptr, eps, K: tl.constexpr, K_PADDED: tl.constexpr):
    """1 / the root of the mean square of x [K]."""
    k = tl.arange(0, K_PADDED)
    return inverse_rms_of(tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32), eps, K)


@triton.jit
def inverse_rms_of(x, eps, K: tl.constexpr):
    """The same of an x that is loaded, in float32 and any shape, with 0 beyond its K numbers."""
    return tl.rsqrt(tl.sum(x * x) / K + eps)


@triton.jit
def normalize(x, shrink, weight):
    """RMSNorm, rounded to x's dtype as its output is. `shrink` is the inverse RMS."""
    return (x.to(tl.float32) * shrink * weight).to(x.dtype)


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up in float32."""
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def load_x(x_ptr, k, inside, K: tl.constexpr, SWIGLU: tl.constexpr):
    """x[k], 0 if not inside. With SWIGLU, x holds gate and up side by side."""
    x = tl.load(x_ptr + k, mask=inside, other=0.0)
    if SWIGLU:
        gate = x.to(tl.float32)
        up = tl.load(x_ptr + K + k, mask=inside, other=0.0).to(tl.float32)
        x = swiglu(gate, up).to(x.dtype)
    return x


@triton.jit
def find_tile(END0: tl.constexpr, END1: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile, which lies within one matrix: (which one, first column, its end).

    Up to three matrices lie side by side, in the columns [0, END0), [END0, END1) and [END1, N).
    """
    program = tl.program_id(0)
    tiles0: tl.constexpr = (END0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = tiles0 + (END1 - END0 + BLOCK_N - 1) // BLOCK_N
    matrix = (program >= tiles0).to(tl.int32) + (program >= tiles1).to(tl.int32)
    tile = program - tl.where(matrix == 0, 0, tl.where(matrix == 1, tiles0, tiles1))
    start = tl.where(matrix == 0, 0, tl.where(matrix == 1, END0, END1)) + tile * BLOCK_N
    return matrix, start, tl.where(matrix == 0, END0, tl.where(matrix == 1, END1, N))


def cut_tiles(ends, block_n):
    """The last column + 1 of up to three matrices -> (END0, END1, tiles of block_n columns)."""
    (end0, end1, *_), n = (*ends, ends[-1]), ends[-1]
    return end0, end1, sum(triton.cdiv(width, block_n) for width in (end0, end1 - end0, n - end1))


@triton.jit
def count_every_row(kept_ptr, MATRICES: tl.constexpr, K: tl.constexpr):
    """Add K to the counts of all matrices; one program does it for all."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        i = tl.arange(0, 4)
        tl.store(kept_ptr + i, tl.load(kept_ptr + i, mask=i < MATRICES) + K, mask=i < MATRICES)

"""y = W x for one token (GEMV), reading only the weights that matter: PyTorch to fast kernels.

When a language model decodes one token at a time, it uses every weight once. So the time of y = W x
is the time to read W. If x[k] is nearly zero, column k of W (row k of w_t, below) can be skipped:

    keep x[k]  iff  not (|x[k]| <= threshold)      compared in float32; "not", so that NaN is kept

W is stored transposed, as w_t [K, N]: input channel k owns row k, N contiguous numbers. Memory is
read in sectors of 32 bytes, so a skipped row saves traffic where a skipped column would not.

Method: Liu et al., "Training-Free Activation Sparsity in Large Language Models" (TEAL,
arXiv:2408.14690), section 4. This file needs torch, and triton on a GPU: copy it where you like.
"""

import functools
import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on a CPU
except ImportError:  # as on macOS: the kernels below become empty names, and a CPU still works
    from unittest.mock import MagicMock

    triton = tl = gdc_launch_dependents = gdc_wait = MagicMock()
    INTERPRETED = False


# ---- 1. The definition -------------------------------------------------------------------------

def definition(x, w_t, threshold):
    """x [K], w_t [K, N] -> y [N]"""
    keep = ~(x.float().abs() <= threshold)
    return x[keep] @ w_t[keep]


# ---- 2. A naive kernel -------------------------------------------------------------------------
#
# A *kernel* is a function that a GPU runs in many *programs* at once. `kernel[(8, 3)](...)` starts
# 24 of them, and `tl.program_id` tells each which it is. A tensor argument arrives as a pointer to
# its first element. Programs work on whole tiles (n, y below), whose sizes are powers of two known
# at compile time (`tl.constexpr`). `tl.load(pointer + offsets, mask)` reads where the mask is true.

@triton.jit
def naive_kernel(x_ptr, w_ptr, y_ptr, threshold, K, N, BLOCK_N: tl.constexpr):
    """One program: BLOCK_N columns of y."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros([BLOCK_N], tl.float32)
    for k in range(K):
        x = tl.load(x_ptr + k).to(tl.float32)
        if ~(tl.abs(x) <= threshold):  # otherwise row k is not read: this saves the bytes
            y += x * tl.load(w_ptr + k * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def naive_gemv(x, w_t, threshold):
    """`definition` on a GPU, for fewer than 2**31 weights: k * N + n has 32 bits."""
    (k, n), y = w_t.shape, x.new_empty(w_t.shape[1])
    naive_kernel[(triton.cdiv(n, 64),)](x, w_t, y, float(threshold), k, n, BLOCK_N=64)
    return y


# ---- 3. What makes it fast ---------------------------------------------------------------------
#
# A GPU has some 130 *multiprocessors*, which run the programs. A load takes half a microsecond to
# arrive, however small it is. To keep the memory busy, each multiprocessor needs tens of kilobytes
# in flight. The naive program looks at x[k], loads 64 columns of row k, and then waits for them.
#
# **Lists.** If the kept rows are known beforehand, many can be loaded at once. So *select* looks
# at x, a few kilobytes, and lists the kept k and x[k]. *Sum rows* walks down that list. In each
# iteration it loads a tile [BLOCK_K, BLOCK_N] of the next BLOCK_K rows, and adds up in float32.
#
# **Split-K.** There are too few tiles of columns for all multiprocessors. So K is cut into SPLITS
# chunks, each with a list of its own; a chunk's sums are a *split*. The last of the
# programs with the same columns adds up their splits, always in the same order: the same bits.
#
# **Dependent launch** (PDL below). Since Hopper, a kernel may begin as soon as all programs of the
# one before it have called `gdc_launch_dependents` or ended. `gdc_wait` waits until that one has
# ended and its results are in memory. So the time of a launch is hidden.

PTX = tl.constexpr(not INTERPRETED)  # The interpreter cannot run PTX, NVIDIA's assembly language.
WARPS = 2  # of a program that sums rows; a warp is 32 threads, and a tile is spread over all


# ---- 4. The parts of fast kernels --------------------------------------------------------------

@triton.jit
def write_list(k, x, keep, chunk, rows_ptr, values_ptr, counts_ptr, CHUNK: tl.constexpr):
    """Store a chunk's kept k and x[k] without gaps; returns how many there are."""
    place = tl.cumsum(keep.to(tl.int32), 0) - 1  # a running sum over the mask
    tl.store(rows_ptr + chunk * CHUNK + place, k, mask=keep)
    tl.store(values_ptr + chunk * CHUNK + place, x, mask=keep)
    count = tl.sum(keep.to(tl.int32))
    tl.store(counts_ptr + chunk, count)
    return count


@triton.jit
def list_entries(rows_ptr, values_ptr, i, count, CHUNK: tl.constexpr):
    """Row numbers and values of a list's entries i; past its end, an arbitrary row and value 0."""
    place = tl.minimum(i, CHUNK - 1)  # not count - 1: so these loads need not wait for it
    values = tl.load(values_ptr + place).to(tl.float32)
    return tl.load(rows_ptr + place), tl.where(i < count, values, 0.0)


@triton.jit
def sum_list(rows_ptr, values_ptr, count, w_ptr, n, end, K: tl.constexpr, N: tl.constexpr,
             CHUNK: tl.constexpr, FULL_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr, ROWS_AT_ONCE: tl.constexpr):
    """Sums over a list's rows, columns n < end: [ROWS_AT_ONCE, BLOCK_N], still to be added up."""
    i = tl.arange(0, BLOCK_K)
    total = tl.zeros([ROWS_AT_ONCE, BLOCK_N], tl.float32)
    k, x = list_entries(rows_ptr, values_ptr, i, count, CHUNK)
    for first in tl.range(0, count, BLOCK_K, num_stages=1):
        # The next entries are on their way meanwhile (num_stages=1: not by Triton).
        next_k, next_x = list_entries(rows_ptr, values_ptr, first + BLOCK_K + i, count, CHUNK)
        offsets = (k.to(tl.int64) if K * N >= 2 ** 31 else k)[:, None] * N + n[None, :]
        inside = (first + i < count)[:, None]  # past the end, load 0: infinity times 0 is NaN
        if not FULL_TILES:
            inside &= (n < end)[None, :]
        # "evict_first": a weight is used once, so the cache may drop it before anything else
        w = tl.load(w_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
        products = to_float32(w) * x[:, None]
        # The threads take ROWS_AT_ONCE rows at a time, so each one adds up only its own numbers.
        products = tl.reshape(products, [BLOCK_K // ROWS_AT_ONCE, ROWS_AT_ONCE, BLOCK_N])
        total += tl.sum(products, axis=0)
        k, x = next_k, next_x
    return total


@triton.jit
def finish(y, n, end, out_ptr, scale_ptr, bias_ptr, residual_ptr, sums_ptr, finished_ptr,
           N: tl.constexpr, SPLITS: tl.constexpr, squares=None, K: tl.constexpr = 1, eps=0.0):
    """Turn one split's sums y [BLOCK_N] of the columns n < end into the result, and store it.

    The last of these columns' splits to finish adds up all. Skip the residual and `squares`,
    which only gpu/ gives: a split's sum of x * x, by which RMSNorm divides."""
    tile, n_tiles, split = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    if SPLITS > 1:
        tl.store(sums_ptr + split * N + n, y, mask=n < end)
        if squares is not None:
            tl.store(sums_ptr + SPLITS * N + split * n_tiles + tile, squares)
        tl.debug_barrier()  # all threads have stored (it is not only for debugging)
        # atomic_add returns the count before it, so only a tile's last program goes on.
        # "acq_rel": that one then sees the sums that the others stored before they counted.
        if tl.atomic_add(finished_ptr + tile, 1, sem="acq_rel") < SPLITS - 1:
            return
        y = tl.zeros_like(y)
        for i in tl.static_range(SPLITS):
            # ".cg": not from this multiprocessor's own cache, which may hold old sums
            y += tl.load(sums_ptr + i * N + n, mask=n < end, other=0.0, cache_modifier=".cg")
        tl.store(finished_ptr + tile, 0)  # for the next launch
        if squares is not None:
            squares = 0.0
            for i in tl.static_range(SPLITS):
                squares += tl.load(sums_ptr + SPLITS * N + i * n_tiles + tile, cache_modifier=".cg")
    if squares is not None:
        y *= tl.rsqrt(squares / K + eps)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < end)


# ---- 5. The two kernels ------------------------------------------------------------------------

@triton.jit
def _select_kernel(x_ptr, rows_ptr, values_ptr, counts_ptr, threshold_ptr, K: tl.constexpr,
                   CHUNK: tl.constexpr, CHUNK_PADDED: tl.constexpr, PDL: tl.constexpr):
    """One program: the list of one chunk of x."""
    chunk = tl.program_id(0)
    i = tl.arange(0, CHUNK_PADDED)
    k = chunk * CHUNK + i
    inside = (i < CHUNK) & (k < K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # at once: the next kernel waits for this list in its own gdc_wait
    x = tl.load(x_ptr + k, mask=inside, other=0.0)
    keep = inside & ~(tl.abs(x.to(tl.float32)) <= tl.load(threshold_ptr))
    write_list(k, x, keep, chunk, rows_ptr, values_ptr, counts_ptr, CHUNK)


@triton.jit
def _sum_rows_kernel(rows_ptr, values_ptr, counts_ptr, w_ptr, out_ptr, scale_ptr, bias_ptr,
                     sums_ptr, finished_ptr, K: tl.constexpr, N: tl.constexpr,
                     CHUNK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_K: tl.constexpr, ROWS_AT_ONCE: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over one chunk's list."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1)
    if PDL:
        gdc_wait()
    total = sum_list(rows_ptr + chunk * CHUNK, values_ptr + chunk * CHUNK,
                     tl.load(counts_ptr + chunk), w_ptr, n, end=N, K=K, N=N, CHUNK=CHUNK,
                     FULL_TILES=N % BLOCK_N == 0, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
                     ROWS_AT_ONCE=ROWS_AT_ONCE)
    if PDL:  # Not earlier: waiting programs of the next kernel would fill multiprocessors unevenly.
        gdc_launch_dependents()
    finish(tl.sum(total, axis=0), n, N, out_ptr, scale_ptr, bias_ptr, None, sums_ptr,
           finished_ptr, N, SPLITS)


def tile_shape(k, n, size):
    """(BLOCK_N, BLOCK_K, ROWS_AT_ONCE, SPLITS) for w_t [k, n] with `size` bytes per weight.

    64 columns are whole sectors of a row, even in int8. A tile has 8 KB: each of 64 threads loads
    128 bytes at once. K is split until each multiprocessor has about eight programs.
    """
    block_n = min(64, max(16, triton.next_power_of_2(n)))
    splits = max(1, min(16, round(1024 / triton.cdiv(n, block_n)), k // 128))
    block_k = min(128 // size, max(32, triton.next_power_of_2(triton.cdiv(k, splits))))
    rows_at_once = min(block_k, WARPS * 32 * (16 // size) // block_n)  # 16 bytes per thread
    return block_n, block_k, rows_at_once, splits


@functools.lru_cache(maxsize=None)
def launch_options(device):
    """Dependent launch (programmatic dependent launch, PDL) where the GPU has it."""
    pdl = not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@functools.lru_cache(maxsize=None)  # never freed: a CUDA graph replays old launches
def workspace(device, *parts):
    """Scratch memory that passes results between programs, zeros at first; parts: (size, dtype)."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call the product with these shapes before capturing a CUDA graph")
    return [torch.zeros(size, dtype=dtype, device=device) for size, dtype in parts]


def _gemv_gpu(x, w_t, threshold, scale, bias, out):
    k, n = w_t.shape
    block_n, block_k, rows, splits = tile_shape(k, n, w_t.element_size())
    chunk, tiles = triton.cdiv(k, splits), triton.cdiv(n, block_n)
    padded, options = triton.next_power_of_2(chunk), launch_options(x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        *lists, sums, finished = workspace(
            x.device, (splits * chunk, torch.int32), (splits * chunk, x.dtype),
            (splits, torch.int32), (splits * n, torch.float32), (tiles, torch.int32))
        _select_kernel[(splits,)](x, *lists, threshold, K=k, CHUNK=chunk, CHUNK_PADDED=padded,
                                  num_warps=min(16, max(1, padded // 256)), **options)
        _sum_rows_kernel[(tiles, splits)](
            *lists, w_t, out, scale, bias, sums, finished, K=k, N=n, CHUNK=chunk, SPLITS=splits,
            BLOCK_N=block_n, BLOCK_K=block_k, ROWS_AT_ONCE=rows, num_warps=WARPS, **options)


# ---- 6. The same on a CPU, and the function to call --------------------------------------------

def _gemv_cpu(x, w_t, threshold):
    """x [K] -> y [N]. `embedding_bag` adds up bags of rows of a table, each times a number. The
    table is w_t: its row k * n_blocks + b is block b of row k. A thread has one bag: one block."""
    rows = (~(x.float().abs() <= threshold)).nonzero().view(-1)
    if w_t.dtype == torch.int8:  # embedding_bag takes floats only
        return x[rows].float() @ w_t[rows].float()
    n_blocks = math.gcd(w_t.shape[1], torch.get_num_threads())
    block = torch.arange(n_blocks)
    entries = (rows * n_blocks + block[:, None]).view(-1)
    return F.embedding_bag(entries, w_t.view(-1, w_t.shape[1] // n_blocks), block * len(rows),
                           mode="sum", per_sample_weights=x[rows].repeat(n_blocks)).view(-1)


def sparse_gemv(x, w_t, threshold, *, scale=None, bias=None, out=None):
    """y[n] = sum of x[k] * w_t[k, n] over the k with not (|x[k]| <= threshold).

    x:         [K], [1, K] or [1, 1, K]; float32, float16 or bfloat16
    w_t:       [K, N], contiguous; x's dtype, or int8 with a `scale`. Dropped rows are never read.
    threshold: a number, negative to keep everything; or a float32 tensor of one element on x's
               device, which may change under a CUDA graph (launches recorded to be replayed)
    scale:     [N], multiplies the sums (int8 weights: one scale per output channel)
    bias:      [N], added last
    out:       where to put the result, [N] or of y's shape

    Returns y in x's dtype, shaped like x with N in place of K. Sums are float32, and the same
    inputs give the same bits. With `out`, a GPU call never synchronises and allocates only for a
    new shape: call it once before capturing a CUDA graph. Calls on different streams must not
    overlap. Raises ValueError, which names an argument that does not fit.
    """
    if not isinstance(threshold, torch.Tensor):
        threshold = _on_device(float(threshold), x.device)
    _check(x, w_t, threshold, scale, bias, out)
    if out is None:
        out = torch.empty(*x.shape[:-1], w_t.shape[1], dtype=x.dtype, device=x.device)
    if x.is_cuda or INTERPRETED:
        _gemv_gpu(x, w_t, threshold, scale, bias, out)
    else:
        y = _gemv_cpu(x.reshape(-1), w_t, threshold)
        y = y if scale is None else y * scale
        out.view(-1).copy_(y if bias is None else y + bias)
    return out


@functools.lru_cache(maxsize=None)  # never freed: a captured graph may read it
def _on_device(threshold, device):
    return torch.tensor([threshold], dtype=torch.float32, device=device)


# ---- Skip this at first: integers to floats in assembly, and the check of arguments -------------

@triton.jit
def to_float32(w):
    """`w.to(tl.float32)` in fewer instructions, which matter here as much as the bytes.

    A bfloat16 is the upper half of a float32, so a shift and a mask convert two of them. GPUs
    convert integers slowly, but the float32 with the bits 0x4B000000 + b is 2**23 + b, for a byte
    b. xor turns each int8 w into b = w + 128. prmt builds 0x4B0000bb: each hex digit of its last
    operand names a byte, 0-3 of `bytes`, 4-7 of 0x4B000000. Then 2**23 + 128 is subtracted. $0, $1
    ... are the outputs, one per weight, then the input, a register of `pack` weights ("=r", "r").
    """
    if PTX and w.dtype == tl.bfloat16:
        bits = tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
                                         "=r,=r,r", [w], dtype=tl.int32, is_pure=True, pack=2)
        return bits.to(tl.float32, bitcast=True)
    elif PTX and w.dtype == tl.int8:
        bits = tl.inline_asm_elementwise("""{
            .reg .b32 bytes;
            xor.b32 bytes, $4, 0x80808080;
            prmt.b32 $0, bytes, 0x4B000000, 0x7440;    prmt.b32 $1, bytes, 0x4B000000, 0x7441;
            prmt.b32 $2, bytes, 0x4B000000, 0x7442;    prmt.b32 $3, bytes, 0x4B000000, 0x7443;
            }""", "=r,=r,=r,=r,r", [w], dtype=tl.int32, is_pure=True, pack=4)
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        return w.to(tl.float32)


def _check(x, w_t, threshold, scale, bias, out):
    """Raise ValueError, naming the argument, its value and what was expected."""
    def require(fits, name, value, wanted):
        if not fits:
            raise ValueError(f"sparse_gemv: {name} is {value}; expected {wanted}")

    require(w_t.dim() == 2, "w_t", f"of shape {tuple(w_t.shape)}", "a matrix [K, N]")
    (k, n), floats = w_t.shape, (torch.float32, torch.float16, torch.bfloat16)
    require(x.shape[-1:] == (k,), "x", f"of shape {tuple(x.shape)}", f"[{k}] for {k} rows")
    require(w_t.dtype != torch.int8 or scale is not None, "scale", None, f"[{n}], as w_t is int8")
    for name, t, size, dtypes in (
            ("x", x, k, floats), ("w_t", w_t, k * n, (x.dtype, torch.int8)),
            ("threshold", threshold, 1, (torch.float32,)), ("scale", scale, n, floats),
            ("bias", bias, n, floats), ("out", out, n, floats)):
        require(t is None or (t.numel() == size and t.dtype in dtypes and t.is_contiguous()
                              and t.device == x.device), name,
                t is not None and f"{t.dtype} {tuple(t.shape)} {t.stride()} on {t.device}",
                f"{size} contiguous elements of {' or '.join(map(str, dtypes))} on {x.device}")

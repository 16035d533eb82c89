"""y = W x for one token, reading only the rows of W that matter: Triton kernels and a CPU route.

When a language model decodes one token at a time, it uses every weight once. So the time of y = W x
is the time to read W. Where x[k] is nearly zero, column k of W hardly changes y: do not read it.

    keep x[k]  iff  not (|x[k]| <= threshold)      compared in float32; "not", so that NaN is kept

**Layout.** W is stored transposed, as w_t [K, N]: input channel k owns row k, N contiguous numbers.
Memory is read in sectors of 32 bytes, so a dropped row saves traffic where a column would not.

**Two kernels.** A Triton kernel is a function run by many *programs* at once: `kernel[(8, 3)](...)`
starts 24 of them, and `tl.program_id` tells each which it is. A program works on tiles, whose sizes
are powers of two known at compile time (`tl.constexpr`). `tl.load(pointer + offsets, mask)` reads a
tile from memory, leaving out the places where the mask is false.
1. *Select* looks at x, a few kilobytes, and lists the kept k and x[k] without gaps. A running
   sum over the mask tells each kept entry its place.
2. *Sum rows* walks down that list. A program owns BLOCK_N output columns. In each step it loads a
   [BLOCK_K, BLOCK_N] tile of the next BLOCK_K rows of the list, multiplies, and adds up in float32.
   It touches no other row: *this is where the bytes are saved*.

**Split-K.** There are often too few columns to keep 130 multiprocessors busy. So K is cut into
SPLITS pieces, each with its own list. The program that finishes last adds up the pieces, always
in the same order: the result has the same bits every time.

**Fusions.** Select can apply RMSNorm (`norm`) or silu(gate) * up (`swiglu`) to x first. Sum rows
can apply a scale, a bias and the residual stream. Each would otherwise be a launch of its own.

Method: Liu et al., "Training-Free Activation Sparsity in Large Language Models" (TEAL,
arXiv:2408.14690), section 4. This file needs torch and triton alone: copy it wherever you like.
"""

import functools
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on a CPU
PTX = tl.constexpr(not INTERPRETED)  # The interpreter cannot run inline PTX.
WARPS = 2  # of a program that sums rows


# ---- GPU ---------------------------------------------------------------------------------------

@triton.jit(do_not_specialize_on_alignment=["kept_ptr", "threshold_ptr"])
def _select_kernel(x_ptr, norm_ptr, rows_ptr, values_ptr, counts_ptr, kept_ptr, threshold_ptr, eps,
                   K: tl.constexpr, CHUNK: tl.constexpr, SWIGLU: tl.constexpr,
                   CHUNK_PADDED: tl.constexpr, K_PADDED: tl.constexpr, PDL: tl.constexpr):
    """One program: the list of kept entries of one chunk of x, for one of the matrices."""
    segment, part = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, CHUNK_PADDED)
    k = part * CHUNK + i
    inside = (i < CHUNK) & (k < K)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if PDL:  # The kernel in front may still run: wait here until what it writes is there.
        gdc_wait()
        gdc_launch_dependents()
    threshold = tl.load(threshold_ptr + segment)
    x = tl.load(x_ptr + k, mask=inside, other=0.0)
    if SWIGLU:
        gate = x.to(tl.float32)
        up = tl.load(x_ptr + K + k, mask=inside, other=0.0).to(tl.float32)
        x = (gate / (1 + tl.exp(-gate)) * up).to(x.dtype)
    if norm_ptr is not None:
        every_k = tl.arange(0, K_PADDED)
        hidden = tl.load(x_ptr + every_k, mask=every_k < K, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden) / K + eps)
        x = (x.to(tl.float32) * inverse_rms * weight).to(x.dtype)  # rounded as RMSNorm's output is

    keep = inside & ~(tl.abs(x.to(tl.float32)) <= threshold)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    item = segment * tl.num_programs(1) + part
    tl.store(rows_ptr + item * CHUNK + place, k, mask=keep)
    tl.store(values_ptr + item * CHUNK + place, x, mask=keep)
    count = tl.sum(keep.to(tl.int32))
    tl.store(counts_ptr + item, count)
    if kept_ptr is not None:
        tl.atomic_add(kept_ptr + segment, count.to(tl.int64), sem="relaxed")


@triton.jit
def _to_float32(w):
    """Weights as float32 in few instructions, which matter here as much as the bytes.

    A bfloat16 is the upper half of a float32, so a shift and a mask convert two of them. GPUs
    convert integers slowly. But the float32 with the bits 0x4B0000bb is 2**23 + bb, so for int8
    w, the byte w + 128 is put there, and 2**23 + 128 subtracted.
    """
    if PTX and w.dtype == tl.bfloat16:
        bits = tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
                                         "=r,=r,r", [w], dtype=tl.int32, is_pure=True, pack=2)
        return bits.to(tl.float32, bitcast=True)
    elif PTX and w.dtype == tl.int8:
        bits = tl.inline_asm_elementwise("""{
            .reg .b32 bytes;
            xor.b32 bytes, $4, 0x80808080;
            prmt.b32 $0, bytes, 0x4B000000, 0x7440;
            prmt.b32 $1, bytes, 0x4B000000, 0x7441;
            prmt.b32 $2, bytes, 0x4B000000, 0x7442;
            prmt.b32 $3, bytes, 0x4B000000, 0x7443;
            }""", "=r,=r,=r,=r,r", [w], dtype=tl.int32, is_pure=True, pack=4)
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        return w.to(tl.float32)


@triton.jit
def _entries(rows_ptr, values_ptr, i, count, CHUNK: tl.constexpr):
    """Row numbers and values of the list's entries i; past its end, any row times 0."""
    place = tl.minimum(i, CHUNK - 1)  # not count - 1: these loads need not wait for the count
    values = tl.load(values_ptr + place).to(tl.float32)
    return tl.load(rows_ptr + place), tl.where(i < count, values, 0.0)


@triton.jit
def _sum_rows_kernel(rows_ptr, values_ptr, counts_ptr, w_ptr, out_ptr, scale_ptr, bias_ptr,
                     residual_ptr, sums_ptr, finished_ptr, K: tl.constexpr, N: tl.constexpr,
                     END0: tl.constexpr, END1: tl.constexpr, CHUNK: tl.constexpr,
                     SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     ROWS_AT_ONCE: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over one list.

    The segments are the columns [0, END0), [END0, END1) and [END1, N). Each has lists of its own.
    """
    # A tile lies within one segment: find this program's segment, and its tile there.
    program, part = tl.program_id(0), tl.program_id(1)
    tiles0: tl.constexpr = (END0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = tiles0 + (END1 - END0 + BLOCK_N - 1) // BLOCK_N
    segment = (program >= tiles0).to(tl.int32) + (program >= tiles1).to(tl.int32)
    tile = program - tl.where(segment == 0, 0, tl.where(segment == 1, tiles0, tiles1))
    start = tl.where(segment == 0, 0, tl.where(segment == 1, END0, END1))
    end = tl.where(segment == 0, END0, tl.where(segment == 1, END1, N))
    n = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    FULL_TILES: tl.constexpr = END0 % BLOCK_N == 0 and END1 % BLOCK_N == 0 and N % BLOCK_N == 0
    item = segment * SPLITS + part
    rows_ptr += item * CHUNK
    values_ptr += item * CHUNK

    if PDL:
        gdc_wait()
    count = tl.load(counts_ptr + item)
    i = tl.arange(0, BLOCK_K)
    total = tl.zeros([ROWS_AT_ONCE, BLOCK_N], tl.float32)
    k, x = _entries(rows_ptr, values_ptr, i, count, CHUNK)
    for first in tl.range(0, count, BLOCK_K, num_stages=1):
        # The next entries are on their way while these rows are loaded.
        next_k, next_x = _entries(rows_ptr, values_ptr, first + BLOCK_K + i, count, CHUNK)
        offsets = (k.to(tl.int64) if K * N >= 2 ** 31 else k)[:, None] * N + n[None, :]
        inside = (first + i < count)[:, None]  # not the last row again: infinity times 0 is NaN
        if not FULL_TILES:
            inside &= (n < end)[None, :]
        w = tl.load(w_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
        products = _to_float32(w) * x[:, None]
        # ROWS_AT_ONCE rows of the tile fill all threads: each adds up what it holds itself.
        products = tl.reshape(products, [BLOCK_K // ROWS_AT_ONCE, ROWS_AT_ONCE, BLOCK_N])
        total += tl.sum(products, axis=0)
        k, x = next_k, next_x

    if PDL:  # Not earlier: waiting programs of the next kernel would fill multiprocessors unevenly.
        gdc_launch_dependents()
    y = tl.sum(total, axis=0)
    if SPLITS > 1:
        tl.store(sums_ptr + part * N + n, y, mask=n < end)
        tl.debug_barrier()  # all threads have stored
        if tl.atomic_add(finished_ptr + program, 1, sem="acq_rel") < SPLITS - 1:
            return
        y = tl.zeros([BLOCK_N], tl.float32)
        for other in tl.static_range(SPLITS):
            # ".cg": from the L2 cache, where the other multiprocessors' sums arrive
            y += tl.load(sums_ptr + other * N + n, mask=n < end, other=0.0, cache_modifier=".cg")
        tl.store(finished_ptr + program, 0)  # for the next launch
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < end)


def _launch_shape(k, n, size):
    """(BLOCK_N, BLOCK_K, SPLITS) for w_t [k, n] with `size` bytes a weight.

    64 columns are whole sectors of a row, even in int8. A tile has 8 KB: each of 64 threads loads
    128 bytes at once. K is split until each of some 130 multiprocessors has about eight programs:
    enough to hide the latency. Chosen by timing whole 1B and 7B models.
    """
    block_n = min(64, max(16, triton.next_power_of_2(n)))
    splits = max(1, min(16, round(1024 / triton.cdiv(n, block_n)), k // 128))
    block_k = min(128 // size, max(32, triton.next_power_of_2(triton.cdiv(k, splits))))
    return block_n, block_k, splits


@functools.lru_cache
def supports_pdl(device):
    """Whether a GPU can start the next kernel early (programmatic dependent launch, Hopper)."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


@functools.lru_cache(maxsize=None)
def _workspace(device, dtype, n_lists, chunk, n, splits, n_programs):
    """What the kernels hand over: lists (rows, values, counts), sums, splits finished so far."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("sparse_gemv: call it with these shapes before capturing a CUDA graph")
    return (torch.empty(n_lists * chunk, dtype=torch.int32, device=device),
            torch.empty(n_lists * chunk, dtype=dtype, device=device),
            torch.empty(n_lists, dtype=torch.int32, device=device),
            torch.empty(splits * n, dtype=torch.float32, device=device),
            torch.zeros(n_programs, dtype=torch.int32, device=device))


def _gemv_gpu(x, w_t, thresholds, ends, scale, bias, norm, swiglu, residual, out, kept):
    k, n = w_t.shape
    segments = len(ends)
    end0, end1, _ = (*ends, n, n)[:3]
    block_n, block_k, splits = _launch_shape(k, n, w_t.element_size())
    chunk = triton.cdiv(k, splits)
    tiles = sum(triton.cdiv(width, block_n) for width in (end0, end1 - end0, n - end1))
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    pdl = supports_pdl(x.device)
    launch = {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    chunk_padded, k_padded = triton.next_power_of_2(chunk), triton.next_power_of_2(k)
    entries = max(chunk_padded, k_padded if norm is not None else 0)
    a_thread = 16 // w_t.element_size()  # weights in one load of 16 bytes
    rows_at_once = min(block_k, WARPS * 32 * a_thread // block_n)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        rows, values, counts, sums, finished = _workspace(
            x.device, x.dtype, segments * splits, chunk, n, splits, tiles)
        _select_kernel[(segments, splits)](
            x, norm_weight, rows, values, counts, kept, thresholds, eps, K=k, CHUNK=chunk,
            SWIGLU=swiglu, CHUNK_PADDED=chunk_padded, K_PADDED=k_padded,
            num_warps=min(16, max(1, entries // 256)), **launch)
        _sum_rows_kernel[(tiles, splits)](
            rows, values, counts, w_t, out, scale, bias, residual, sums, finished, K=k, N=n,
            END0=end0, END1=end1, CHUNK=chunk, SPLITS=splits, BLOCK_N=block_n,
            BLOCK_K=block_k, ROWS_AT_ONCE=rows_at_once, num_warps=WARPS, **launch)
    return out


# ---- CPU ---------------------------------------------------------------------------------------

def _gemv_cpu(x, w_t, thresholds, ends, kept):
    """x [K] -> its sums [N]. `embedding_bag` adds up chosen rows of a table, each times a number.

    Each row of w_t is cut into equal blocks. The same memory is then a table of K * n_blocks
    rows, and one bag sums up one block of columns. So matrices may differ, and the bags run on
    several threads.
    """
    width = math.gcd(*ends)
    width //= math.gcd(width, torch.get_num_threads())
    lists, start = [], 0  # of kept k, one for each block
    for i, (t, end) in enumerate(zip(thresholds.tolist(), ends)):
        rows = (x.float().abs() <= t).logical_not_().nonzero().view(-1)
        lists += [rows] * ((end - start) // width)
        if kept is not None:
            kept[i] += len(rows)
        start = end
    if w_t.dtype == torch.int8:  # embedding_bag takes floats alone
        blocks = zip(lists, w_t.split(width, dim=1))
        return torch.cat([x[rows].float() @ block[rows].float() for rows, block in blocks])
    n_blocks = len(lists)
    entries = torch.cat([rows * n_blocks + block for block, rows in enumerate(lists)])
    starts = torch.tensor([0] + [len(rows) for rows in lists[:-1]]).cumsum(0)
    return F.embedding_bag(entries, w_t.view(-1, width), starts, mode="sum",
                           per_sample_weights=x[torch.cat(lists)]).view(-1)


# ---- the public function -----------------------------------------------------------------------

def sparse_gemv(x, w_t, threshold, *, ends=None, scale=None, bias=None, norm=None, swiglu=False,
                residual=None, out=None, kept=None):
    """y[n] = sum of x[k] * w_t[k, n] over the k with not (|x[k]| <= threshold).

    x:         [K], [1, K] or [1, 1, K] (2 K wide with swiglu); float32, float16 or bfloat16
    w_t:       [K, N], contiguous; x's dtype, or int8 with a `scale`. Dropped rows are never read.
    threshold: a number, negative to keep everything; or one for each of the matrices of `ends`:
               a list, or a float32 tensor on x's device that may change under a captured graph
    ends:      where up to three matrices lie side by side in w_t, the last column + 1 of each
    scale:     [N] float32, multiplies the sums (int8 weights: one scale per output channel)
    bias:      [N], added next
    norm:      (weight [K], eps): x is first RMS-normalised (in float32, rounded to x's dtype)
    swiglu:    x holds gate and up side by side; silu(gate) * up takes its place first
    residual:  [N], x's dtype, added last
    out:       where to put the result; may be `residual` itself
    kept:      int64 [number of matrices]: the number of kept rows is added to it

    Returns y in x's dtype, shaped like x with N in place of K. Sums are float32, and the same
    inputs give the same bits. With `out`, a GPU call never synchronises, and allocates only when
    it meets a new shape: call it once before capturing a CUDA graph. Calls on different streams
    must not overlap, and the kernel in front must not write norm's weight. Raises ValueError,
    naming the argument, for shapes, dtypes, strides or devices that do not fit.
    """
    ends = tuple(ends) if ends else (w_t.shape[-1],)
    thresholds = threshold
    if not isinstance(threshold, torch.Tensor):
        values = tuple(threshold) if isinstance(threshold, list) else (threshold,) * len(ends)
        thresholds = _constant(values, x.device)
    _check(x, w_t, thresholds, ends, scale, bias, norm, swiglu, residual, out, kept)
    flat = x.reshape(-1)
    if x.is_cuda or INTERPRETED:
        if out is None:
            out = torch.empty(*x.shape[:-1], ends[-1], dtype=x.dtype, device=x.device)
        return _gemv_gpu(
            flat, w_t, thresholds, ends, scale, bias, norm, swiglu, residual, out, kept)
    if swiglu:
        gate, up = flat.chunk(2)
        flat = F.silu(gate) * up
    if norm is not None:
        flat = F.rms_norm(flat, flat.shape, *norm)
    y = _gemv_cpu(flat, w_t, thresholds, ends, kept)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual.view(-1)
    y = y.to(x.dtype).view(*x.shape[:-1], -1)
    return y if out is None else out.copy_(y)


@functools.lru_cache(maxsize=None)  # never freed: a captured graph may read it
def _constant(thresholds, device):
    return torch.tensor(thresholds, dtype=torch.float32, device=device)


def _check(x, w_t, thresholds, ends, scale, bias, norm, swiglu, residual, out, kept):
    """Raise ValueError, naming the argument, its value and what was expected."""
    def require(fits, name, value, wanted):
        if not fits:
            raise ValueError(f"sparse_gemv: {name} is {value}; expected {wanted}")

    require(w_t.dim() == 2, "w_t", f"of shape {tuple(w_t.shape)}", "a matrix [K, N]")
    (k, n), floats = w_t.shape, (torch.float32, torch.float16, torch.bfloat16)
    width = 2 * k if swiglu else k
    require(x.shape[-1:] == (width,), "x", f"of shape {tuple(x.shape)}", f"[{width}] for {k} rows")
    require(not swiglu or norm is None, "norm", "given with swiglu", "None: only one prepares x")
    require(w_t.dtype != torch.int8 or scale is not None, "scale", None, f"[{n}], for w_t is int8")
    require(len(ends) <= 3 and list(ends) == sorted(set(ends)) and ends[0] > 0 and ends[-1] == n,
            "ends", ends, f"up to three ascending ends, the last at w_t's {n} columns")
    for name, t, size, dtypes in (
            ("x", x, width, floats), ("w_t", w_t, k * n, (x.dtype, torch.int8)),
            ("threshold", thresholds, len(ends), (torch.float32,)), ("scale", scale, n, floats),
            ("bias", bias, n, floats), ("norm", norm and norm[0], k, floats),
            ("residual", residual, n, floats), ("out", out, n, floats),
            ("kept", kept, len(ends), (torch.int64,))):
        require(t is None or (t.numel() == size and t.dtype in dtypes and t.is_contiguous()
                              and t.device == x.device), name,
                t is not None and f"{t.dtype} {tuple(t.shape)} {t.stride()} on {t.device}",
                f"{size} contiguous elements of {' or '.join(map(str, dtypes))} on {x.device}")

"""y = W x for one token, reading only the rows of W that matter: two Triton kernels, a CPU route, the plain definition.

When a language model decodes one token at a time, every weight is read once for a single multiply-add, so the time of
y = W x is the time it takes to read W. If x[k] is nearly zero, column k of W hardly changes y: leave it out, and it
need not be read. The rule, the same everywhere in this project, compares in float32:

    keep x[k]  iff  not (|x[k]| <= threshold)            (written with `not`, so that a NaN is kept and stays visible)

**Layout.** W is stored transposed, `w_t [K, N]`: input channel k owns row k, N contiguous numbers. Memory is read in
sectors of 32 bytes, so only a dropped *row* saves traffic; the columns dropped from a row-major W would save none.

**Two kernels.** A Triton kernel is a function run by many *programs* at once; each works on small tiles whose size is
a power of two known at compile time, spread over the threads of its warps.
1. *Select* looks at x, a few kilobytes, and writes the list of kept k and x[k], without gaps: a running sum over the
   mask tells each kept entry its place.
2. *Sum rows* walks down that list. A program owns BLOCK_N columns of the output; in each step it takes the next
   BLOCK_K entries, loads a [BLOCK_K, BLOCK_N] tile made of just those rows of w_t, multiplies and adds up in float32.
   No other row is touched, nor any instruction spent on it: *this is where the bytes are saved*.
Deciding inside the second kernel, with a mask over all rows, saves the same bytes and one launch, but every program
then walks past the dropped rows too. Timed within whole layers at 50%, a mask was slower: README, "Where a token's time
goes on the GPU".

**Split-K.** There are often too few columns to keep 130 multiprocessors busy, so K is cut into SPLITS pieces, each with
a list of its own. A program leaves its float32 sums in memory, and whichever program is the last of its columns adds
the pieces up, always in the same order: the result has the same bits every time, as it would not with atomic adds.

**Fusions.** Select also prepares x: RMSNorm (`norm`) or silu(gate) * up (`swiglu`); sum rows applies scale and bias and
adds the residual stream (`residual`). Each would otherwise be a launch of its own, worth as much as reading 10-20 MB.

Method: Liu et al., "Training-Free Activation Sparsity in Large Language Models" (TEAL, arXiv:2408.14690), section 4.
The file needs torch and triton only: copy it wherever you like.
"""

import functools
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 runs the kernels on the CPU, for tests
MACHINE_CODE = tl.constexpr(not INTERPRETED)  # there, PTX instructions can't be
WARPS = 2  # of a program that sums rows


def sparse_gemv_reference(x, w_t, threshold, *, scale=None, bias=None, norm=None, swiglu=False, residual=None, out=None,
                          kept=None):
    """The definition of `sparse_gemv`, same arguments, in plain PyTorch operations and float64 sums. Slow."""
    y_dtype = x.dtype
    x = x.reshape(-1)
    if swiglu:
        gate, up = x.double().chunk(2)
        x = (F.silu(gate) * up).to(y_dtype)
    if norm is not None:
        weight, eps = norm
        x = F.rms_norm(x.double(), x.shape, weight.double(), eps).to(y_dtype)
    parts, start = [], 0
    for i, (end, t) in enumerate(_segments(threshold, w_t.shape[1])):
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).reshape(())
        keep = ~(x.float().abs() <= t)
        if kept is not None:
            kept[i] += keep.sum()
        parts.append(x[keep].double() @ w_t[keep, start:end].double())
        start = end
    y = torch.cat(parts)  # [N]
    if scale is not None:
        y = y * scale.double()
    if bias is not None:
        y = y + bias.double()
    if residual is not None:
        y = y + residual.reshape(-1).double()
    y = y.to(y_dtype)
    return y if out is None else out.copy_(y.view(out.shape))


def _segments(threshold, n):
    """A threshold argument as a list of (end column, threshold)."""
    return list(threshold) if isinstance(threshold, (list, tuple)) else [(n, threshold)]


def _size(w_t):
    """(K, N) of a matrix w_t, packed or not."""
    return (w_t.shape[1], w_t.shape[0] * (w_t.shape[2] - 8)) if w_t.dim() == 3 else (w_t.shape[0], w_t.shape[-1])


# ---- CPU -----------------------------------------------------------------------------------------------------------

class CpuGemv:
    """x [K] or [1, K] -> x @ w_t on the CPU, for one matrix and its thresholds: what does not depend on x is made once.

    `embedding_bag` adds up chosen rows of a table, each times a weight. Cut every row of w_t [K, N] into `n_blocks`
    equal blocks and the same memory is a table [K * n_blocks, N / n_blocks]. One bag sums one block of columns, so each
    segment can have its own kept rows, and the bags run on several threads. Packed int8 has been cut already, into
    [n_blocks, K, width + 8] bytes: see `sparse_gemv`.

    `threshold` and `kept` are those of `sparse_gemv`; scale, bias and the result's rounding to x's dtype are left out.
    """

    def __init__(self, w_t, threshold, kept=None):
        k, self.n = _size(w_t)
        segments = [(end, float(t)) for end, t in _segments(threshold, self.n)]
        self.packed = w_t.dtype == torch.uint8
        width = self.n // w_t.shape[0] if self.packed else _width(self.n, segments)
        self.n_blocks = self.n // width
        self.table = w_t.view(k * self.n_blocks, -1)
        self.rows, self.starts = _bags(k, self.n_blocks, self.packed)
        self.first_blocks = [start // width for start in (0, *(end for end, _ in segments[:-1]))]
        self.thresholds = None  # keep everything
        if any(t >= 0 for _, t in segments):  # [n_blocks, 1]
            self.thresholds = torch.tensor([[next(t for end, t in segments if block * width < end)]
                                            for block in range(self.n_blocks)])
        self.kept = None if kept is None else kept.numpy()  # the same memory, with far cheaper scalars

    def __call__(self, x):
        rows, starts = self.rows, self.starts
        weights = (x.float() if self.packed else x).expand(self.n_blocks, -1)
        if self.thresholds is None:
            weights = weights.reshape(-1)
        else:
            keep = (x.float().abs() <= self.thresholds).logical_not_().view(-1)  # [n_blocks * K]
            entries = keep.numpy().nonzero()[0]  # several times as fast as PyTorch's, which has a branch for each entry
            starts = torch.from_numpy(entries.searchsorted(starts.numpy()))
            entries = torch.from_numpy(entries)
            rows = entries if self.packed else rows.index_select(0, entries)
            weights = weights.take(entries)
        if self.kept is not None:
            ends = [*starts.tolist(), len(rows)]
            for i, block in enumerate(self.first_blocks):
                self.kept[i] += ends[block + 1] - ends[block]
        if self.packed:
            y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
                self.table, rows, starts, per_sample_weights=weights)
        else:
            y = torch.embedding_bag(self.table, rows, starts, False, 0, False, weights)[0]
        return y.view(*x.shape[:-1], self.n)


def _gemv_cpu_int8(x, w_t, segments, kept):
    """The same for int8 that is not packed: simple, and slow, because it copies the kept rows as float32 first."""
    y, start = [], 0
    for i, (end, t) in enumerate(segments):
        rows = (x.float().abs() <= t).logical_not_().nonzero().view(-1)
        if kept is not None:
            kept[i] += len(rows)
        y.append(x[rows].float() @ w_t[rows, start:end].float())
        start = end
    return torch.cat(y)


def _width(n, segments):
    """The width of a block: none crosses the end of a segment, unless all have one threshold; there is one for every
    thread, or a multiple of that; and they are narrow enough for a thread's sums to stay in its L1 cache."""
    whole = n if len({t for _, t in segments}) == 1 else math.gcd(*(end for end, _ in segments))
    pieces = math.ceil(torch.get_num_threads() * whole / n)
    return whole // math.gcd(whole, pieces * math.ceil(whole / pieces / 8192))


@functools.lru_cache(maxsize=None)
def _bags(k, n_blocks, packed):
    """Of every entry of x [n_blocks, K], its row in the table, bag after bag; and where each bag starts."""
    rows = torch.arange(n_blocks * k)  # as packed weights lie; others interleave the blocks
    if not packed:
        rows = rows.view(k, n_blocks).T.reshape(-1)
    return rows, torch.arange(0, n_blocks * k, k)


# ---- GPU -----------------------------------------------------------------------------------------------------------

@triton.jit
def _select_kernel(x_ptr, norm_ptr, rows_ptr, values_ptr, counts_ptr, kept_ptr, threshold0, threshold1, threshold2, eps,
                   K: tl.constexpr, CHUNK: tl.constexpr, THRESHOLD_IN_MEMORY: tl.constexpr, SWIGLU: tl.constexpr,
                   CHUNK_PADDED: tl.constexpr, K_PADDED: tl.constexpr, PDL: tl.constexpr):
    """One program: the list of kept entries of one chunk of x under the threshold of one segment of columns."""
    segment, part = tl.program_id(0), tl.program_id(1)
    if PDL:  # start while the kernel before this one still runs, but wait here for what it writes
        gdc_wait()
        gdc_launch_dependents()
    if THRESHOLD_IN_MEMORY:
        threshold0 = tl.load(threshold0)
        threshold1 = tl.load(threshold1)
        threshold2 = tl.load(threshold2)
    threshold = tl.where(segment == 0, threshold0, tl.where(segment == 1, threshold1, threshold2))

    i = tl.arange(0, CHUNK_PADDED)
    k = part * CHUNK + i
    inside = (i < CHUNK) & (k < K)
    x = tl.load(x_ptr + k, mask=inside, other=0.0)
    if SWIGLU:
        gate, up = x.to(tl.float32), tl.load(x_ptr + K + k, mask=inside, other=0.0).to(tl.float32)
        x = (gate / (1 + tl.exp(-gate)) * up).to(x.dtype)
    if norm_ptr is not None:
        every_k = tl.arange(0, K_PADDED)
        hidden = tl.load(x_ptr + every_k, mask=every_k < K, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden) / K + eps)
        weight = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * inverse_rms * weight).to(x.dtype)  # rounded, as a separate RMSNorm would leave it

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
    """Weights as float32 in the fewest instructions, which matter here as much as the bytes.

    A bfloat16 is the upper half of a float32, so two in a register are a shift and a mask. GPUs convert integers at a
    fraction of their speed; but with byte b = w + 128 as its low bits, the float32 of bits 0x4B0000bb is 2**23 + b.
    """
    if MACHINE_CODE and w.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [w],
                                         dtype=tl.int32, is_pure=True, pack=2).to(tl.float32, bitcast=True)
    elif MACHINE_CODE and w.dtype == tl.int8:
        return tl.inline_asm_elementwise("""{
            .reg .b32 bytes;
            xor.b32 bytes, $4, 0x80808080;
            prmt.b32 $0, bytes, 0x4B000000, 0x7440;
            prmt.b32 $1, bytes, 0x4B000000, 0x7441;
            prmt.b32 $2, bytes, 0x4B000000, 0x7442;
            prmt.b32 $3, bytes, 0x4B000000, 0x7443;
            }""", "=r,=r,=r,=r,r", [w], dtype=tl.int32, is_pure=True, pack=4).to(tl.float32, bitcast=True) - 8388736.0
    else:
        return w.to(tl.float32)


@triton.jit
def _entries(rows_ptr, values_ptr, i, count):
    """Row numbers and values of the list's entries i; past its end the last row again, with a value of 0."""
    place = tl.maximum(tl.minimum(i, count - 1), 0)
    return tl.load(rows_ptr + place), tl.where(i < count, tl.load(values_ptr + place).to(tl.float32), 0.0)


@triton.jit
def _sum_rows_kernel(rows_ptr, values_ptr, counts_ptr, w_ptr, out_ptr, scale_ptr, bias_ptr, residual_ptr, sums_ptr,
                     finished_ptr, K: tl.constexpr, N: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr,
                     CHUNK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     ROWS_AT_ONCE: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK_N columns, summed over one list. Columns [0, END0), [END0, END1), [END1, N) have own lists."""
    # Tiles never straddle two segments: find this program's segment, and its tile within it.
    program, part = tl.program_id(0), tl.program_id(1)
    tiles0: tl.constexpr = (END0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = tiles0 + (END1 - END0 + BLOCK_N - 1) // BLOCK_N
    segment = (program >= tiles0).to(tl.int32) + (program >= tiles1).to(tl.int32)
    tile = program - tl.where(segment == 0, 0, tl.where(segment == 1, tiles0, tiles1))
    start = tl.where(segment == 0, 0, tl.where(segment == 1, END0, END1))
    end = tl.where(segment == 0, END0, tl.where(segment == 1, END1, N))
    n = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ALL_COLUMNS: tl.constexpr = END0 % BLOCK_N == 0 and END1 % BLOCK_N == 0 and N % BLOCK_N == 0
    item = segment * SPLITS + part
    rows_ptr += item * CHUNK
    values_ptr += item * CHUNK

    if PDL:
        gdc_wait()
    count = tl.load(counts_ptr + item)
    i = tl.arange(0, BLOCK_K)
    total = tl.zeros([ROWS_AT_ONCE, BLOCK_N], tl.float32)
    k, x = _entries(rows_ptr, values_ptr, i, count)
    for first in tl.range(0, count, BLOCK_K, num_stages=1):
        # the next entries are on their way while these rows are loaded
        next_k, next_x = _entries(rows_ptr, values_ptr, first + BLOCK_K + i, count)
        offsets = (k.to(tl.int64) if K * N >= 2 ** 31 else k)[:, None] * N + n[None, :]
        inside = (first + i < count)[:, None]  # beyond lies the last row again: infinity times 0 must not get in
        if not ALL_COLUMNS:
            inside &= (n < end)[None, :]
        w = tl.load(w_ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
        products = _to_float32(w) * x[:, None]
        # Of the tile, ROWS_AT_ONCE rows lie side by side over the threads; each thread adds up the rows it holds.
        total += tl.sum(tl.reshape(products, [BLOCK_K // ROWS_AT_ONCE, ROWS_AT_ONCE, BLOCK_N]), axis=0)
        k, x = next_k, next_x

    if PDL:  # not earlier: programs of the next kernel that wait here already would fill some multiprocessors unevenly
        gdc_launch_dependents()
    y = tl.sum(total, axis=0)
    if SPLITS > 1:
        tl.store(sums_ptr + part * N + n, y, mask=n < end)
        tl.debug_barrier()  # all threads have stored
        if tl.atomic_add(finished_ptr + program, 1, sem="acq_rel") < SPLITS - 1:
            return
        y = tl.zeros([BLOCK_N], tl.float32)
        for other in tl.static_range(SPLITS):
            y += tl.load(sums_ptr + other * N + n, mask=n < end, other=0.0, cache_modifier=".cg")
        tl.store(finished_ptr + program, 0)  # as the next launch expects it
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < end)


def _launch_shape(k, n):
    """(BLOCK_N, BLOCK_K, SPLITS) for w_t [k, n].

    A tile of 64 columns reads whole sectors of a row even in int8; with 128 rows it gives each of 64 threads 128
    weights to load at once, enough to do without prefetching through shared memory. K is split until there are some
    six programs for each of the GPU's SMs, about 130. Chosen by timing whole layers of a Llama-2-7B and a Llama-3-8B,
    bfloat16 and int8, on an H200, changing one product at a time: about a dozen shapes for each.
    """
    block_n = min(64, max(16, triton.next_power_of_2(n)))
    splits = max(1, min(8, round(768 / triton.cdiv(n, block_n)), k // 256))
    return block_n, min(128, max(32, triton.next_power_of_2(triton.cdiv(k, splits)))), splits


@functools.lru_cache
def supports_pdl(device):
    """Programmatic dependent launch, an early start of the next kernel, came with Hopper."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


@functools.lru_cache(maxsize=None)
def _workspace(device, dtype, n_lists, chunk, n, splits, n_programs):
    """What the two kernels hand over, one set for every shape: row numbers, values and counts of the lists; the sums
    of each split and how many of them are finished."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("sparse_gemv: call it once with these shapes before capturing a CUDA graph")
    return (torch.empty(n_lists * chunk, dtype=torch.int32, device=device),
            torch.empty(n_lists * chunk, dtype=dtype, device=device),
            torch.empty(n_lists, dtype=torch.int32, device=device),
            torch.empty(splits * n, dtype=torch.float32, device=device),
            torch.zeros(n_programs, dtype=torch.int32, device=device))


def _gemv_gpu(x, w_t, segments, scale, bias, norm, swiglu, residual, out, kept):
    k, n = w_t.shape
    ends = [end for end, _ in segments] + [n] * (3 - len(segments))
    thresholds = [t for _, t in segments] + [segments[-1][1]] * (3 - len(segments))
    block_n, block_k, splits = _launch_shape(k, n)
    chunk = triton.cdiv(k, splits)
    tiles = sum(triton.cdiv(width, block_n) for width in (ends[0], ends[1] - ends[0], n - ends[1]))
    rows, values, counts, sums, finished = _workspace(
        x.device, x.dtype, len(segments) * splits, chunk, n, splits, tiles)
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    pdl = supports_pdl(x.device)
    launch = {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    chunk_padded, k_padded = triton.next_power_of_2(chunk), triton.next_power_of_2(k)
    entries = max(chunk_padded, k_padded if norm is not None else 0)
    _select_kernel[(len(segments), splits)](
        x, norm_weight, rows, values, counts, kept, *thresholds, eps, K=k, CHUNK=chunk,
        THRESHOLD_IN_MEMORY=isinstance(thresholds[0], torch.Tensor), SWIGLU=swiglu, CHUNK_PADDED=chunk_padded,
        K_PADDED=k_padded, num_warps=min(16, max(1, entries // 256)), **launch)
    rows_at_once = min(block_k, WARPS * 32 * 16 // w_t.element_size() // block_n)  # 16 bytes a thread
    _sum_rows_kernel[(tiles, splits)](
        rows, values, counts, w_t, out, scale, bias, residual, sums, finished, K=k, N=n, END0=ends[0], END1=ends[1],
        CHUNK=chunk, SPLITS=splits, BLOCK_N=block_n, BLOCK_K=block_k, ROWS_AT_ONCE=rows_at_once,
        num_warps=WARPS, **launch)
    return out


# ---- the public function -------------------------------------------------------------------------------------------

def sparse_gemv(x, w_t, threshold, *, scale=None, bias=None, norm=None, swiglu=False, residual=None, out=None,
                kept=None):
    """Sparse matrix-vector product: y[n] = sum of x[k] * w_t[k, n] over the k with not (|x[k]| <= threshold).

    x:         [K], [1, K] or [1, 1, K] (2 K wide with swiglu); float32, float16 or bfloat16
    w_t:       [K, N], contiguous; x's dtype, or int8 with a `scale`. Rows of dropped k are never read.
               On the CPU int8 is fast only packed: uint8 [blocks, K, width + 8], block b holding columns b * width,
               b * width + 1, ... as w + 128, and the bytes of the two float32 numbers 1 and -128 after every row.
    threshold: a float; or a one-element float32 tensor on x's device, so that it can change under a captured graph;
               or up to three (end column, threshold) segments, when w_t holds several matrices side by side.
               A negative threshold keeps everything.
    scale:     [N] float32, multiplies the sums (int8 weights: one scale per output channel)
    bias:      [N], added next
    norm:      (weight [K], eps): x is first RMS-normalised (float32 inside, rounded to x's dtype)
    swiglu:    x holds gate and up side by side: silu(gate) * up takes its place first
    residual:  [N], x's dtype, added last
    out:       where to put the result; may be `residual` itself
    kept:      int64 [number of segments]: the number of kept rows is added to it

    Returns y in x's dtype, shaped like x with N in place of K. Sums are float32 and reproducible: the same inputs give
    the same bits. With `out` given, a GPU call never synchronises, and allocates its workspace only the first time it
    meets a shape: so call once before capturing a CUDA graph, and do not let calls on different streams overlap.
    Raises ValueError naming the argument for shapes, dtypes, strides or devices that do not fit.
    """
    k, n = _size(w_t)
    segments = _segments(threshold, n)
    _check(x, w_t, segments, scale, bias, norm, swiglu, residual, out, kept)
    flat = x.reshape(-1)
    if (x.is_cuda or INTERPRETED) and w_t.dtype != torch.uint8:
        if out is None:
            out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
        return _gemv_gpu(flat, w_t, segments, scale, bias, norm, swiglu, residual, out, kept)
    if swiglu:
        flat = F.silu(flat[:k]) * flat[k:]
    if norm is not None:
        flat = F.rms_norm(flat, flat.shape, *norm)
    y = _gemv_cpu_int8(flat, w_t, segments, kept) if w_t.dtype == torch.int8 else CpuGemv(w_t, segments, kept)(flat)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual.view(-1)
    y = y.to(x.dtype).view(*x.shape[:-1], n)
    return y if out is None else out.copy_(y)


def _check(x, w_t, segments, scale, bias, norm, swiglu, residual, out, kept):
    """Raise ValueError, naming the argument and both values, for what the kernels cannot take."""
    def refuse(name, value, wanted):
        raise ValueError(f"sparse_gemv: {name} is {value}; expected {wanted}")

    packed = w_t.dtype == torch.uint8
    if w_t.dim() != (3 if packed else 2) or not w_t.is_contiguous():
        refuse("w_t", f"{tuple(w_t.shape)} with strides {w_t.stride()}", "a contiguous matrix [K, N]")
    k, n = _size(w_t)
    width = 2 * k if swiglu else k
    if x.shape[-1:] != (width,) or x.numel() != width:
        refuse("x's shape", tuple(x.shape), f"[{width}] or [1, {width}], for w_t has {k} rows")
    if swiglu and norm is not None:
        refuse("norm", f"{tuple(norm[0].shape)} with swiglu", "None: the two prepare x in different ways")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        refuse("x's dtype", x.dtype, "torch.float32, torch.float16 or torch.bfloat16")
    if w_t.dtype not in (x.dtype, torch.int8) and not (packed and x.device.type == "cpu"):
        refuse("w_t's dtype", w_t.dtype, f"x's dtype, {x.dtype}, or torch.int8")
    if w_t.dtype in (torch.int8, torch.uint8) and scale is None:
        refuse("scale", None, f"a tensor [{n}], for w_t is int8")
    if w_t.device != x.device:
        refuse("w_t's device", w_t.device, f"x's device, {x.device}")
    ends = [end for end, _ in segments]
    if len(ends) > 3 or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != n:
        refuse("threshold's list of ends", ends, f"up to three ascending ends, the last at w_t's {n} columns")
    if packed and any(end % (n // w_t.shape[0]) for end in ends):
        refuse("threshold's list of ends", ends, f"multiples of {n // w_t.shape[0]}, the width of w_t's blocks")
    if len({isinstance(t, torch.Tensor) for _, t in segments}) > 1:
        refuse("threshold's list", [t for _, t in segments], "all floats or all tensors")
    for _, t in segments:
        if isinstance(t, torch.Tensor) and (t.numel() != 1 or t.dtype != torch.float32 or t.device != x.device):
            refuse("a threshold", f"{t.dtype} {tuple(t.shape)} on {t.device}", f"one float32 number on {x.device}")
    for name, tensor, size in (("scale", scale, n), ("bias", bias, n), ("norm's weight", norm and norm[0], k),
                               ("residual", residual, n), ("out", out, n), ("kept", kept, len(ends))):
        if tensor is not None and (tensor.numel() != size or not tensor.is_contiguous() or tensor.device != x.device):
            refuse(name, f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}",
                   f"{size} contiguous elements on {x.device}")

"""y = W x for one token, reading only the rows of W that matter: a Triton kernel, a CPU route and the plain definition.

When a language model decodes one token at a time, every weight is read once for a single multiply-add, so the time of
y = W x is the time it takes to read W. If x[k] is nearly zero, column k of W hardly changes y: leave it out, and it
need not be read. The rule, the same everywhere in this project, compares in float32:

    keep x[k]  iff  not (|x[k]| <= threshold)            (written with `not`, so that a NaN is kept and stays visible)

**Layout.** W is stored transposed, `w_t [K, N]`: input channel k owns row k, N contiguous numbers. Memory is read in
sectors of 32 bytes, so only a dropped *row* saves traffic; the columns dropped from a row-major W would save none.

**What a program does.** A Triton kernel is a function run by many *programs* at once; each works on small tiles whose
size is a power of two known at compile time, spread over the threads of its warps. Here a program owns BLOCK_N columns
of the output. It walks down K in steps of BLOCK_K: loads that piece of x, decides which entries to keep, and loads the
[BLOCK_K, BLOCK_N] tile of w_t under that mask. A masked-out load issues no memory transaction: *this is where the bytes
are saved*. While one tile is multiplied, the loads of the next STAGES - 1 are under way. The products are added up in a
float32 tile of the same shape, which stays in registers and is summed over its rows only once, at the end.

**Split-K.** One thread a column would walk down K alone, with far too few loads under way to keep the memory busy, so K
is split as well. Here it is split over the warps of a program: a tile is narrow (BLOCK_N 16-64) and tall (BLOCK_K up to
512), each warp holds other rows of it, and the final sum adds the warps' shares through shared memory, always in the
same order. Splitting K over programs too would need either float atomics, whose order and so whose last bits change
from run to run, or a second pass over partial sums; measured, neither was faster than narrow tiles.

**Fusions.** One kernel also normalises x first (`norm`), applies silu(gate) * up to the result (`swiglu`) or adds the
residual stream (`residual`): the hidden state is a few kilobytes, so every program can prepare the whole of it, and a
launch saved is worth several microseconds, as much as reading 10-20 MB.

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

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 runs the kernel on the CPU, for tests


def sparse_gemv_reference(x, w_t, threshold, *, scale=None, bias=None, norm=None, swiglu=False, residual=None, out=None,
                          kept=None):
    """The definition of `sparse_gemv`, same arguments, in plain PyTorch operations and float64 sums. Slow."""
    y_dtype = x.dtype
    x = x.reshape(-1)
    if norm is not None:
        weight, eps = norm
        x = F.rms_norm(x.double(), x.shape, weight.double(), eps).to(y_dtype)
    parts, start = [], 0
    for i, (end, t) in enumerate(_segments(threshold, w_t.shape[1], swiglu)):
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
    if swiglu:
        gate, up = y.chunk(2)
        y = F.silu(gate) * up
    if residual is not None:
        y = y + residual.reshape(-1).double()
    y = y.to(y_dtype)
    return y if out is None else out.copy_(y.view(out.shape))


def _segments(threshold, n, swiglu):
    """A threshold argument as a list of (end column, threshold); a SwiGLU has two segments, gate and up."""
    if isinstance(threshold, (list, tuple)):
        return list(threshold)
    return [(n // 2, threshold), (n, threshold)] if swiglu else [(n, threshold)]


def _size(w_t):
    """(K, N) of a matrix w_t, packed or not."""
    return (w_t.shape[1], w_t.shape[0] * (w_t.shape[2] - 8)) if w_t.dim() == 3 else (w_t.shape[0], w_t.shape[-1])


# ---- CPU -----------------------------------------------------------------------------------------------------------

def _gemv_cpu(x, w_t, segments, kept):
    """x [K] times w_t [K, N] -> [N] with `embedding_bag`, which adds up chosen rows of a table, each times a weight.

    Cut every row of w_t into `n_blocks` equal blocks and the same memory is a table [K * n_blocks, N / n_blocks]. One
    bag sums one block of columns, so each segment can have its own kept rows, and the bags run on several threads.
    Packed int8 has been cut already, into [n_blocks, K, width + 8] bytes: see `sparse_gemv`.
    """
    k, n = _size(w_t)
    packed = w_t.dtype == torch.uint8
    segments = tuple((end, float(t)) for end, t in segments)
    n_blocks, rows, starts, thresholds, first_blocks = _bags(
        k, n, segments, torch.get_num_threads(), n // w_t.shape[0] if packed else None)
    weights = (x.float() if packed else x).expand(n_blocks, k).reshape(-1)  # [n_blocks * K], as rows
    if thresholds is not None:
        entries = (x.float().abs() <= thresholds).logical_not_().view(-1).nonzero().view(-1)
        rows = entries if packed else rows.index_select(0, entries)
        weights = weights.index_select(0, entries)
        starts = torch.searchsorted(entries, starts)
    if kept is not None:
        ends, counts = [*starts.tolist(), len(rows)], kept.numpy()  # the same memory, with far cheaper scalars
        for i, block in enumerate(first_blocks):
            counts[i] += ends[block + 1] - ends[block]
    table = w_t.view(k * n_blocks, -1)
    if packed:
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            table, rows, starts, per_sample_weights=weights).view(n)
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0].view(n)


def _gemv_cpu_int8(x, w_t, segments, kept):
    """`_gemv_cpu` for int8 that is not packed: simple, and slow, because it copies the kept rows as float32 first."""
    y, start = [], 0
    for i, (end, t) in enumerate(segments):
        rows = (x.float().abs() <= t).logical_not_().nonzero().view(-1)
        if kept is not None:
            kept[i] += len(rows)
        y.append(x[rows].float() @ w_t[rows, start:end].float())
        start = end
    return torch.cat(y)


@functools.lru_cache(maxsize=None)
def _bags(k, n, segments, n_threads, packed_width):
    """What does not depend on x: the number of blocks, each bag's table rows and where it starts, the threshold of
    every block [n_blocks, 1] (None to keep everything), and the first block of every segment."""
    if packed_width is not None:
        width = packed_width
    elif len({t for _, t in segments}) == 1:  # a mask for all: as many blocks as threads
        width = n // math.gcd(n, n_threads)
    else:
        width = functools.reduce(math.gcd, [end for end, _ in segments])
    n_blocks = n // width
    rows = torch.arange(n_blocks * k)  # bag after bag, as packed weights lie; others interleave the blocks
    if packed_width is None:
        rows = (torch.arange(k) * n_blocks + torch.arange(n_blocks)[:, None]).view(-1)
    starts = torch.arange(0, n_blocks * k, k)
    thresholds = torch.tensor([[next(t for end, t in segments if block * width < end)] for block in range(n_blocks)])
    first_blocks = [start // width for start in (0, *(end for end, _ in segments[:-1]))]
    return n_blocks, rows, starts, None if thresholds.amax() < 0 else thresholds, first_blocks


# ---- GPU -----------------------------------------------------------------------------------------------------------

@triton.jit
def _to_float32(w):
    """Weights as float32. For int8 by two simple operations, since GPUs convert integers at a fraction of their speed:
    with byte b = w + 128 as its low bits, the float32 of bits 0x4B0000bb is exactly 2**23 + b."""
    if w.dtype == tl.int8:
        bits = w.to(tl.uint8, bitcast=True).to(tl.uint32) ^ 0x4B000080  # the sign bit flipped: w + 128
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        return w.to(tl.float32)


@triton.jit
def _load_x(x_ptr, norm_ptr, k, inverse_rms, K: tl.constexpr, NORM: tl.constexpr):
    """x[k], normalised and rounded to x's dtype as a separate RMSNorm would leave it, as float32; 0 from K on."""
    x = tl.load(x_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last")
    if NORM:
        weight = tl.load(norm_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last")
        x = (x.to(tl.float32) * inverse_rms * weight.to(tl.float32)).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _add_rows(total, x, k, threshold, w_ptr, n, end, K: tl.constexpr, N: tl.constexpr, ALL_COLUMNS: tl.constexpr,
              BLOCK_K: tl.constexpr):
    """total [BLOCK_K, BLOCK_N] += x[k] * w_t[k, n] for the kept k; w_ptr is the first of these rows.

    Columns at `end` and beyond count as 0.
    """
    keep = ~(tl.abs(x) <= threshold)
    if K % BLOCK_K:
        keep &= k < K  # the last tile reaches past the end
    mask = keep[:, None]
    if not ALL_COLUMNS:
        mask &= (n < end)[None, :]
    offsets = tl.arange(0, BLOCK_K)[:, None] * N + n[None, :]  # 32 bits do within a tile, if not within the matrix
    w = tl.load(w_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    x = tl.where(keep, x, 0.0)  # a dropped infinity must not meet the zeros that stand in for its row
    return total + _to_float32(w) * x[:, None]


@triton.jit
def _finish(total, n, end, scale_ptr, bias_ptr, SCALE: tl.constexpr, BIAS: tl.constexpr):
    """Sum the float32 tile over its rows, in a fixed order, and apply scale and bias -> [BLOCK_N]."""
    y = tl.sum(total, axis=0)
    if SCALE:
        y *= tl.load(scale_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    return y


@triton.jit
def _sparse_gemv_kernel(x_ptr, w_ptr, out_ptr, scale_ptr, bias_ptr, norm_ptr, residual_ptr, kept_ptr,
                        threshold0, threshold1, threshold2, eps,
                        K: tl.constexpr, N: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr,
                        THRESHOLD_IN_MEMORY: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
                        NORM: tl.constexpr, K_PADDED: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr,
                        COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
                        PDL: tl.constexpr):
    """One program: BLOCK_N columns of the output. Columns [0, END0), [END0, END1), [END1, N) have own thresholds."""
    # Tiles never straddle two segments: find this program's segment, and its tile within it.
    program = tl.program_id(0)
    tiles0: tl.constexpr = (END0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = tiles0 + (END1 - END0 + BLOCK_N - 1) // BLOCK_N
    segment = (program >= tiles0).to(tl.int32) + (program >= tiles1).to(tl.int32)
    tile = program - tl.where(segment == 0, 0, tl.where(segment == 1, tiles0, tiles1))
    start = tl.where(segment == 0, 0, tl.where(segment == 1, END0, END1))
    end = tl.where(segment == 0, END0, tl.where(segment == 1, END1, N))
    n = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ALL_COLUMNS: tl.constexpr = END0 % BLOCK_N == 0 and END1 % BLOCK_N == 0 and N % BLOCK_N == 0

    if PDL:  # what stands above may overlap the kernel before this one; what that kernel wrote is visible from here
        gdc_wait()
        gdc_launch_dependents()
    if THRESHOLD_IN_MEMORY:
        threshold0 = tl.load(threshold0)
        threshold1 = tl.load(threshold1)
        threshold2 = tl.load(threshold2)
    threshold = tl.where(segment == 0, threshold0, tl.where(segment == 1, threshold1, threshold2))
    inverse_rms = 1.0
    if NORM:
        every_k = tl.arange(0, K_PADDED)
        hidden = tl.load(x_ptr + every_k, mask=every_k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden) / K + eps)

    if COUNT:
        # One program more than there are tiles counts the kept rows, while the others work.
        if program == tl.num_programs(0) - 1:
            count0 = tl.zeros([1024], tl.int32)
            count1 = tl.zeros([1024], tl.int32)
            count2 = tl.zeros([1024], tl.int32)
            for first in tl.range(0, K, 1024):
                k = first + tl.arange(0, 1024)
                magnitude = tl.abs(_load_x(x_ptr, norm_ptr, k, inverse_rms, K, NORM))
                count0 += ((k < K) & ~(magnitude <= threshold0)).to(tl.int32)
                count1 += ((k < K) & ~(magnitude <= threshold1)).to(tl.int32)
                count2 += ((k < K) & ~(magnitude <= threshold2)).to(tl.int32)
            tl.store(kept_ptr, tl.load(kept_ptr) + tl.sum(count0))
            if END0 < N:
                tl.store(kept_ptr + 1, tl.load(kept_ptr + 1) + tl.sum(count1))
            if END1 < N:
                tl.store(kept_ptr + 2, tl.load(kept_ptr + 2) + tl.sum(count2))
            return

    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    if SWIGLU:  # the two segments are gate and up, equally wide; this program makes the same columns of both
        total_up = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        x = _load_x(x_ptr, norm_ptr, k, inverse_rms, K, NORM)
        total = _add_rows(total, x, k, threshold, w_ptr, n, end, K, N, ALL_COLUMNS, BLOCK_K)
        if SWIGLU:
            total_up = _add_rows(total_up, x, k, threshold1, w_ptr, END0 + n, END0 + end, K, N, ALL_COLUMNS, BLOCK_K)
        w_ptr += BLOCK_K * N

    y = _finish(total, n, end, scale_ptr, bias_ptr, SCALE, BIAS)
    if SWIGLU:
        y_up = _finish(total_up, END0 + n, END0 + end, scale_ptr, bias_ptr, SCALE, BIAS)
        y = y / (1 + tl.exp(-y)) * y_up
    if RESIDUAL:
        y += tl.load(residual_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < end)


def _launch_shape(n, itemsize, swiglu):
    """(BLOCK_N, BLOCK_K, warps, stages) for w_t of n columns.

    Wide tiles read longer runs of a row and repeat less work, but each of the GPU's SMs, about 130, needs a program.
    The fewer programs share an SM, the more bytes each has to keep in flight: its stages but one, in shared memory.
    The rule was drawn from timing about 60 shapes for each product of a Llama-2-7B and a Llama-3-8B on an H200.
    """
    n_out = n // 2 if swiglu else n
    block_n = max(16, min(64 if n_out > 16384 else 32, triton.next_power_of_2(n_out // 192)))
    programs, tiles, stages = n_out // block_n, 2 if swiglu else 1, 3
    block_k, warps = 512, 8 if programs <= 132 else 4
    # At most 64 sums a thread, in registers, and 100 KB of the 227 KB of shared memory an SM has.
    while tiles * block_k * block_n > 64 * 32 * warps or tiles * block_k * block_n * itemsize * (stages - 1) > 100_000:
        block_k //= 2
    return block_n, block_k, warps, stages


@functools.lru_cache
def supports_pdl(device):
    """Programmatic dependent launch, an early start of the next kernel, came with Hopper."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def _gemv_gpu(x, w_t, segments, scale, bias, norm, swiglu, residual, out, kept):
    k, n = w_t.shape
    ends = [end for end, _ in segments] + [n] * (3 - len(segments))
    thresholds = [t for _, t in segments] + [segments[-1][1]] * (3 - len(segments))
    block_n, block_k, warps, stages = _launch_shape(n, w_t.element_size(), swiglu)
    widths = (ends[0],) if swiglu else (ends[0], ends[1] - ends[0], n - ends[1])
    grid = (sum(triton.cdiv(width, block_n) for width in widths) + (kept is not None),)
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    pdl = supports_pdl(x.device)
    _sparse_gemv_kernel[grid](
        x, w_t, out, scale, bias, norm_weight, residual, kept, *thresholds, eps,
        K=k, N=n, END0=ends[0], END1=ends[1], THRESHOLD_IN_MEMORY=isinstance(thresholds[0], torch.Tensor),
        SCALE=scale is not None, BIAS=bias is not None, NORM=norm is not None, K_PADDED=triton.next_power_of_2(k),
        SWIGLU=swiglu, RESIDUAL=residual is not None, COUNT=kept is not None, BLOCK_N=block_n, BLOCK_K=block_k,
        STAGES=stages, PDL=pdl, num_warps=warps, **({"launch_pdl": True} if pdl else {}))
    return out


# ---- the public function -------------------------------------------------------------------------------------------

def sparse_gemv(x, w_t, threshold, *, scale=None, bias=None, norm=None, swiglu=False, residual=None, out=None,
                kept=None):
    """Sparse matrix-vector product: y[n] = sum of x[k] * w_t[k, n] over the k with not (|x[k]| <= threshold).

    x:         [K], [1, K] or [1, 1, K]; float32, float16 or bfloat16
    w_t:       [K, N], contiguous; x's dtype, or int8 with a `scale`. Rows of dropped k are never read.
               On the CPU int8 is fast only packed: uint8 [blocks, K, width + 8], block b holding columns b * width,
               b * width + 1, ... as w + 128, and the bytes of the two float32 numbers 1 and -128 after every row.
    threshold: a float; or a one-element float32 tensor on x's device, so that it can change under a captured graph;
               or up to three (end column, threshold) segments, when w_t holds several matrices side by side.
               A negative threshold keeps everything.
    scale:     [N] float32, multiplies the sums (int8 weights: one scale per output channel)
    bias:      [N], added next
    norm:      (weight [K], eps): x is first RMS-normalised (float32 inside, rounded to x's dtype)
    swiglu:    the result is silu(left half) * right half, N / 2 wide
    residual:  [N] (or [N / 2]), x's dtype, added last
    out:       where to put the result; may be `residual` itself
    kept:      int64 [number of segments] (two with swiglu): the number of kept rows is added to it

    Returns y in x's dtype, shaped like x with N (or N / 2) in place of K. Sums are float32 and reproducible: the
    same inputs give the same bits. With `out` given, a GPU call neither allocates nor synchronises. Raises ValueError
    naming the argument for shapes, dtypes, strides or devices that do not fit.
    """
    _, n = _size(w_t)
    segments = _segments(threshold, n, swiglu)
    _check(x, w_t, segments, scale, bias, norm, swiglu, residual, out, kept)
    n_out = n // 2 if swiglu else n
    flat = x.reshape(-1)
    if (x.is_cuda or INTERPRETED) and w_t.dtype != torch.uint8:
        if out is None:
            out = torch.empty(*x.shape[:-1], n_out, dtype=x.dtype, device=x.device)
        return _gemv_gpu(flat, w_t, segments, scale, bias, norm, swiglu, residual, out, kept)
    if norm is not None:
        flat = F.rms_norm(flat, flat.shape, *norm)
    y = (_gemv_cpu_int8 if w_t.dtype == torch.int8 else _gemv_cpu)(flat, w_t, segments, kept)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    if swiglu:
        y = F.silu(y[:n_out]) * y[n_out:]
    if residual is not None:
        y = y + residual.view(-1)
    y = y.to(x.dtype).view(*x.shape[:-1], n_out)
    return y if out is None else out.copy_(y)


def _check(x, w_t, segments, scale, bias, norm, swiglu, residual, out, kept):
    """Raise ValueError, naming the argument and both values, for what the kernels cannot take."""
    def refuse(name, value, wanted):
        raise ValueError(f"sparse_gemv: {name} is {value}; expected {wanted}")

    packed = w_t.dtype == torch.uint8
    if w_t.dim() != (3 if packed else 2) or not w_t.is_contiguous():
        refuse("w_t", f"{tuple(w_t.shape)} with strides {w_t.stride()}", "a contiguous matrix [K, N]")
    k, n = _size(w_t)
    if x.shape[-1:] != (k,) or x.numel() != k:
        refuse("x's shape", tuple(x.shape), f"[{k}] or [1, {k}], for w_t has {k} rows")
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
    if swiglu and ends != [n // 2, 2 * (n // 2)]:
        refuse("threshold's list of ends", ends, f"[{n // 2}, {2 * (n // 2)}], gate and up, with swiglu")
    for _, t in segments:
        if isinstance(t, torch.Tensor) and (t.numel() != 1 or t.dtype != torch.float32 or t.device != x.device):
            refuse("a threshold", f"{t.dtype} {tuple(t.shape)} on {t.device}", f"one float32 number on {x.device}")
    n_out = n // 2 if swiglu else n
    for name, tensor, size in (("scale", scale, n), ("bias", bias, n), ("norm's weight", norm and norm[0], k),
                               ("residual", residual, n_out), ("out", out, n_out), ("kept", kept, len(ends))):
        if tensor is not None and (tensor.numel() != size or not tensor.is_contiguous() or tensor.device != x.device):
            refuse(name, f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}",
                   f"{size} contiguous elements on {x.device}")

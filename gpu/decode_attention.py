"""Attention of one new token over the KV cache, in one kernel: RoPE, cache write, attention.

While decoding, attention reads every cached key and value once, so it is bound by memory. One
program per key head would leave most of the GPU idle, so the context is split too
(flash-decoding). Each program takes a chunk of one head's keys, computes its softmax with a
running maximum, and leaves an unnormalised sum. The program that finishes last combines the
chunks of its head, always in the order of the context: the result has the same bits every time.
Query heads that share a key head (grouped-query attention) are rows of one small matrix, so keys
and values are read once for all of them.

The position lives in GPU memory, and the launch does not depend on it: one captured CUDA graph
serves every length. Programs without a chunk return at once, so the cost follows the tokens held.

Sources: Dao et al., "Flash-Decoding for long-context inference" (2023); Milakov and Gimelshein,
"Online normalizer calculation for softmax" (arXiv:1805.02867). This file needs only torch and
triton.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rope(ptr, mask, half: tl.constexpr, cos, sin, norm_ptr, norm_mask, eps, NORM: tl.constexpr):
    """RoPE of the heads at ptr, pointers to their first halves: in float32, then rounded.

    If NORM, RMSNorm comes first, with the weights at norm_ptr, and is rounded by itself.
    """
    a = tl.load(ptr, mask=mask, other=0.0)
    b = tl.load(ptr + half, mask=mask, other=0.0)
    a32, b32 = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        squares = tl.sum(a32 * a32 + b32 * b32, axis=1)[:, None]
        shrink = tl.rsqrt(squares / (2 * half) + eps)
        a32 *= shrink * tl.load(norm_ptr, mask=norm_mask, other=0.0).to(tl.float32)
        b32 *= shrink * tl.load(norm_ptr + half, mask=norm_mask, other=0.0).to(tl.float32)
        a32, b32 = a32.to(a.dtype).to(tl.float32), b32.to(a.dtype).to(tl.float32)
    return (a32 * cos - b32 * sin).to(a.dtype), (b32 * cos + a32 * sin).to(a.dtype)


@triton.jit
def _find_chunk(position, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """This program's chunk of the cached tokens that `position` sees: (start, end, how many chunks
    there are). A program whose number is not below that has none."""
    first = tl.maximum(position + 1 - WINDOW, 0) if WINDOW else 0
    length = position - first
    # At least two blocks per chunk, and up to four in a single one: less would not be worth the
    # combination.
    least = tl.where(length <= 4 * BLOCK_S, 4, 2)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S), least) * BLOCK_S
    start = first + tl.program_id(1) * chunk
    return start, tl.minimum(start + chunk, position), tl.maximum(tl.cdiv(length, chunk), 1)


@triton.jit
def _attend(q_a, q_b, k_ptr, v_ptr, start, end, scale, biggest, total, y, HEAD_DIM: tl.constexpr,
            HALF_PADDED: tl.constexpr, BLOCK_S: tl.constexpr):
    """Continue a running softmax over the cached tokens from start to end.

    q_a, q_b: the queries' halves [GROUP_PADDED, HALF_PADDED]
    biggest, total, y: the largest score so far, the sum of exp(score - biggest) [GROUP_PADDED], and
              that of the values times it [GROUP_PADDED, 2 * HALF_PADDED]; returned updated
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    half, dim = tl.arange(0, HALF_PADDED), tl.arange(0, 2 * HALF_PADDED)
    for s0 in tl.range(start, end, BLOCK_S, num_stages=3):
        s = s0 + tl.arange(0, BLOCK_S)
        k_rows = k_ptr + s[:, None] * HEAD_DIM + half[None, :]
        k_mask = (s < end)[:, None] & (half < HALF)[None, :]
        k_a = tl.load(k_rows, mask=k_mask, other=0.0)
        k_b = tl.load(k_rows + HALF, mask=k_mask, other=0.0)
        v_mask = (s < end)[:, None] & (dim < HEAD_DIM)[None, :]
        v = tl.load(v_ptr + s[:, None] * HEAD_DIM + dim[None, :], mask=v_mask, other=0.0)
        scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")  # [GROUP_PADDED, BLOCK_S]
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee") * scale
        scores = tl.where((s < end)[None, :], scores, float("-inf"))
        new_biggest = tl.maximum(biggest, tl.max(scores, axis=1))
        shrink = tl.exp(biggest - new_biggest)
        weights = tl.exp(scores - new_biggest[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        biggest = new_biggest
    return biggest, total, y


@triton.jit
def _decode_attention_kernel(qkv_ptr, k_ptr, v_ptr, out_ptr, cos_ptr, sin_ptr, growth_ptr,
                             position_ptr, sums_ptr, stats_ptr, counter_ptr, context, scale,
                             q_norm_ptr, k_norm_ptr, eps, NORM: tl.constexpr,
                             N_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
                             WINDOW: tl.constexpr, SPLITS: tl.constexpr,
                             GROUP_PADDED: tl.constexpr, MEMBERS: tl.constexpr,
                             CHUNKS_AT_ONCE: tl.constexpr, HALF_PADDED: tl.constexpr,
                             BLOCK_S: tl.constexpr, PDL: tl.constexpr):
    """One program: one chunk of the context for one key head and its GROUP query heads."""
    head, split = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    g, half = tl.arange(0, GROUP_PADDED), tl.arange(0, HALF_PADDED)
    dim = tl.arange(0, 2 * HALF_PADDED)
    k_ptr += head.to(tl.int64) * context * HEAD_DIM
    v_ptr += head.to(tl.int64) * context * HEAD_DIM
    # The position and the older keys were complete before the kernel before this one began.
    position = tl.load(position_ptr).to(tl.int32)
    start, end, n_chunks = _find_chunk(position, WINDOW, SPLITS, BLOCK_S)
    if split >= n_chunks:
        return
    half_mask = (half < HALF)[None, :]
    cos = tl.load(cos_ptr + position * HALF + half, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + half, mask=half < HALF, other=0.0)[None, :]
    scale *= tl.load(growth_ptr + position)  # of the scores
    if PDL:  # dependent launch: the next kernel may start, and this one waits for qkv
        gdc_wait()
        gdc_launch_dependents()
    heads = qkv_ptr + (head * GROUP + g)[:, None] * HEAD_DIM
    q_a, q_b = _rope(heads + half[None, :], (g < GROUP)[:, None] & half_mask, HALF, cos, sin,
                     q_norm_ptr + half[None, :], half_mask, eps, NORM)
    new_k = qkv_ptr + (N_KV_HEADS * GROUP + head) * HEAD_DIM
    new_a, new_b = _rope(new_k + half[None, :], half_mask, HALF, cos, sin,
                         k_norm_ptr + half[None, :], half_mask, eps, NORM)
    new_v = tl.load(new_k + N_KV_HEADS * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    # The last chunk also has the new token. Its key and value enter the cache, and the running
    # softmax begins with its score.
    newest = split == n_chunks - 1
    if newest:
        row = k_ptr + position * HEAD_DIM + half[None, :]
        tl.store(row, new_a, mask=half_mask)
        tl.store(row + HALF, new_b, mask=half_mask)
        tl.store(v_ptr + position * HEAD_DIM + dim, new_v, mask=dim < HEAD_DIM)
    score = tl.sum(q_a.to(tl.float32) * new_a.to(tl.float32)
                   + q_b.to(tl.float32) * new_b.to(tl.float32), axis=1)
    biggest = tl.where(newest, score * scale, float("-inf"))  # [GROUP_PADDED]
    total = tl.where(newest, tl.full([GROUP_PADDED], 1.0, tl.float32), 0.0)
    y = tl.zeros([GROUP_PADDED, 2 * HALF_PADDED], tl.float32) + new_v.to(tl.float32)[None, :]
    biggest, total, y = _attend(q_a, q_b, k_ptr, v_ptr, start, end, scale, biggest, total,
                                tl.where(newest, y, 0.0), HEAD_DIM, HALF_PADDED, BLOCK_S)
    if n_chunks == 1:
        out = out_ptr + (head * GROUP + g)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out, (y / total[:, None]).to(out_ptr.dtype.element_ty),
                 mask=(g < GROUP)[:, None] & (dim < HEAD_DIM)[None, :])
    else:
        done = _leave(biggest, total, y, sums_ptr, stats_ptr, counter_ptr + head,
                      (head * SPLITS + split) * GROUP, GROUP, GROUP_PADDED, HEAD_DIM)
        if done == n_chunks - 1:
            _combine(sums_ptr, stats_ptr, out_ptr, head, n_chunks, GROUP, HEAD_DIM, SPLITS, MEMBERS,
                     2 * HALF_PADDED, CHUNKS_AT_ONCE)
            tl.store(counter_ptr + head, 0)  # for the next launch


@triton.jit
def _leave(biggest, total, y, sums_ptr, stats_ptr, counter_ptr, slot, GROUP: tl.constexpr,
           GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Leave a chunk's sums for the last program of its head, which combines those of all chunks;
    returns how many had done so before."""
    g, dim = tl.arange(0, GROUP_PADDED), tl.arange(0, y.shape[1])
    tl.store(sums_ptr + (slot + g)[:, None] * HEAD_DIM + dim[None, :], y,
             mask=(g < GROUP)[:, None] & (dim < HEAD_DIM)[None, :])
    tl.store(stats_ptr + (slot + g) * 2, biggest, mask=g < GROUP)
    tl.store(stats_ptr + (slot + g) * 2 + 1, total, mask=g < GROUP)
    tl.debug_barrier()  # all threads have stored
    # "acq_rel": whoever sees this addition also sees what was stored before it
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def _combine(sums_ptr, stats_ptr, out_ptr, head, n_chunks, GROUP: tl.constexpr,
             HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, MEMBERS: tl.constexpr,
             DIM_PADDED: tl.constexpr, CHUNKS_AT_ONCE: tl.constexpr):
    """Write one head's output: its chunks' sums, each scaled to the largest score of all chunks."""
    member, dim = tl.arange(0, MEMBERS), tl.arange(0, DIM_PADDED)
    every = tl.arange(0, SPLITS)
    slots = (head * SPLITS + every)[:, None] * GROUP + member[None, :]  # [SPLITS, MEMBERS]
    used = (every < n_chunks)[:, None] & (member < GROUP)[None, :]
    maxima = tl.load(stats_ptr + slots * 2, mask=used, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(stats_ptr + slots * 2 + 1, mask=used, other=0.0, cache_modifier=".cg")
    highest = tl.maximum(tl.max(maxima, axis=0), -1e30)  # [MEMBERS], finite where unused
    weight_sum = tl.sum(totals * tl.exp(maxima - highest[None, :]), axis=0)
    y = tl.zeros([MEMBERS, DIM_PADDED], tl.float32)
    for i0 in tl.range(0, n_chunks, CHUNKS_AT_ONCE):
        i = i0 + tl.arange(0, CHUNKS_AT_ONCE)
        at = (head * SPLITS + i)[:, None] * GROUP + member[None, :]
        held = (i < n_chunks)[:, None] & (member < GROUP)[None, :]
        biggest = tl.load(stats_ptr + at * 2, mask=held, other=float("-inf"),
                          cache_modifier=".cg")
        sums = tl.load(sums_ptr + at[:, :, None] * HEAD_DIM + dim[None, None, :],
                       mask=held[:, :, None] & (dim < HEAD_DIM)[None, None, :], other=0.0,
                       cache_modifier=".cg")
        y += tl.sum(sums * tl.exp(biggest - highest[None, :])[:, :, None], axis=0)
    out = out_ptr + (head * GROUP + member)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out, (y / weight_sum[:, None]).to(out_ptr.dtype.element_ty),
             mask=(member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :])


class Workspace:
    """What the chunks of a head leave for one another, allocated before a graph is captured."""

    def __init__(self, n_heads, n_kv_heads, head_dim, device):
        # For long contexts at least as many programs as the GPU holds at once, three per
        # multiprocessor, but not more chunks than one combination can take. A power of two, as
        # the size of every tile.
        self.splits = min(32, max(4, triton.next_power_of_2(384 // n_kv_heads)))
        n_slots = n_heads * self.splits
        self.sums = torch.empty(n_slots * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(n_slots * 2, dtype=torch.float32, device=device)
        self.counter = torch.zeros(n_kv_heads, dtype=torch.int32, device=device)


def decode_attention(qkv, k_cache, v_cache, cos, sin, growth, position, workspace, out,
                     window=None, norms=None, pdl=False):
    """Attention of the token at `position`, whose key and value are also written into the cache:
    what `Block.attention` (model.py) does between its two products, for one token.

    qkv:       [(n_heads + 2 n_kv_heads) * head_dim], this token's queries, keys and values,
               before RoPE
    k_cache, v_cache: [n_kv_heads, context, head_dim], contiguous; row `position` is written, the
               rows before it are read
    cos, sin:  float32 [context, head_dim / 2]
    growth:    float32 [context], multiplies a query after RoPE; all 1 in most models
    position:  integer tensor of one element, on the device
    out:       [n_heads * head_dim], written
    window:    the token sees itself and window - 1 tokens before it; None for all
    norms:     (weights of q's RMSNorm [head_dim], of k's, eps), of each head, before RoPE; or None
    pdl:       use dependent launch (Hopper and newer): the kernel begins before the one before it
               has ended, and waits for it where it needs its results
    """
    n_kv_heads, context, head_dim = k_cache.shape
    group = qkv.numel() // head_dim // n_kv_heads - 2  # query heads that share a key head
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)  # any pointer will do where there are none
    members, dim_padded = triton.next_power_of_2(group), triton.next_power_of_2(head_dim)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        _decode_attention_kernel[(n_kv_heads, workspace.splits)](
            qkv, k_cache, v_cache, out, cos, sin, growth, position, workspace.sums, workspace.stats,
            workspace.counter, context, head_dim ** -0.5, q_norm, k_norm, eps,
            NORM=norms is not None, N_KV_HEADS=n_kv_heads, GROUP=group, HEAD_DIM=head_dim,
            WINDOW=window or 0,
            SPLITS=workspace.splits, GROUP_PADDED=max(16, members), MEMBERS=members,
            CHUNKS_AT_ONCE=max(1, min(32, 16384 // (members * dim_padded))),
            HALF_PADDED=max(16, triton.next_power_of_2(head_dim // 2)),
            BLOCK_S=64 if head_dim * qkv.element_size() <= 256 else 32, PDL=pdl, num_warps=4,
            **({"launch_pdl": True} if pdl else {}))
    return out

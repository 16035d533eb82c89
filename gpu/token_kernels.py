"""The two ends of a decode step on a GPU: a token's embedding, and the likeliest token.

Both are small. But PyTorch takes four kernels for the one, and 27 us for the argmax of 128,256
logits of the other, about what a whole layer of a 1B model costs. So each is one kernel here.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from sparse_gemv import launch_options, workspace

LOGITS = 1024  # that one program looks at
CHANNELS = 256  # that one program copies


@triton.jit
def _embed_kernel(token_ptr, position_ptr, table_ptr, x_ptr, token_stride, channel_stride,
                  HIDDEN_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK channels of the token's embedding."""
    token = tl.maximum(tl.load(token_ptr), 0)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < HIDDEN_SIZE
    x = tl.load(table_ptr + token * token_stride + channel.to(tl.int64) * channel_stride,
                mask=inside, other=0.0)
    tl.store(x_ptr + channel, x, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(position_ptr, tl.load(position_ptr) + 1)


def embed(model, token, position, x):
    """Write the embedding of `token` into x [hidden_size], and add 1 to `position`.

    token, position: int64 [1] on the device; a token of -1 counts as 0
    """
    # A tied embedding is a column of the LM head.
    table = model.lm_head.w_t.T if model.embedding is None else model.embedding
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _embed_kernel[(triton.cdiv(x.numel(), CHANNELS),)](
            token, position, table, x, *table.stride(), HIDDEN_SIZE=x.numel(), BLOCK=CHANNELS,
            num_warps=4)


@triton.jit
def _likeliest_kernel(logits_ptr, token_ptr, best_ptr, place_ptr, finished_ptr,
                      V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
                      PDL: tl.constexpr):
    """One program: the first largest of BLOCK logits. The last one compares all programs'."""
    chunk, n_chunks = tl.program_id(0), tl.num_programs(0)
    if PDL:
        gdc_wait()
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + i, mask=i < V, other=float("-inf")).to(tl.float32)
    finite = tl.min(((tl.abs(logits) < float("inf")) | (i >= V)).to(tl.int32), axis=0) == 1
    best, place = tl.max(tl.where(finite, logits, 0.0), axis=0, return_indices=True)
    # An infinite or NaN logit beats all finite ones, so that the host gets to see it.
    tl.store(best_ptr + chunk, tl.where(finite, best, float("inf")))
    tl.store(place_ptr + chunk, tl.where(finite, chunk * BLOCK + place, -1))
    tl.debug_barrier()  # all threads have stored
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == n_chunks - 1:
        every = tl.arange(0, CHUNKS_PADDED)
        bests = tl.load(best_ptr + every, mask=every < n_chunks, other=float("-inf"),
                        cache_modifier=".cg")
        _, winner = tl.max(bests, axis=0, return_indices=True)
        token = tl.load(place_ptr + winner, cache_modifier=".cg")
        tl.store(token_ptr, token.to(tl.int64))
        tl.store(finished_ptr, 0)  # for the next launch


def likeliest_on_gpu(logits):
    """`sampling.likeliest` on a GPU."""
    n_chunks = triton.cdiv(logits.numel(), LOGITS)
    token = torch.empty(1, dtype=torch.int64, device=logits.device)
    # The programs leave their largest logits and the places of these for the last one.
    parts = workspace(logits.device, (n_chunks, torch.float32), (n_chunks, torch.int32),
                      (1, torch.int32))
    with torch.cuda.device_of(logits):
        _likeliest_kernel[(n_chunks,)](
            logits, token, *parts, V=logits.numel(), BLOCK=LOGITS,
            CHUNKS_PADDED=triton.next_power_of_2(n_chunks), num_warps=4,
            **launch_options(logits.device))
    return token

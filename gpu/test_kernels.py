"""Attention of one token, and the choice of a token. On a GPU, or in Triton's interpreter, which
test_sparse_gemv.py starts."""

import pytest
import torch

import sampling
from conftest import DEVICE, KERNELS, needs_kernels
from gpu import token_kernels
from gpu.decode_attention import Workspace, decode_attention
from model import Block, Config, KVCache, Linear

likeliest = token_kernels.likeliest_on_gpu if KERNELS else sampling.likeliest
pytestmark = pytest.mark.usefixtures("seed", "poisoned")


def test_chunks_of_attention_are_a_power_of_two():
    """A tile of all chunks needs that."""
    for n_kv_heads in range(1, 500):
        splits = Workspace(n_kv_heads, n_kv_heads, 1, "cpu").splits
        assert splits in (4, 8, 16, 32) and splits >= min(32, 384 // n_kv_heads)


def attention_of_the_model(qkv, k, v, rope, position, n_heads, window, norms):
    """The definition of `decode_attention`, which writes into k and v as it does."""
    n_kv_heads, context, head_dim = k.shape
    config = Config(1, 1, 1, 1, n_heads, n_kv_heads, head_dim, 1e-5, context=context,
                    sliding_window=window, qk_norm="head" if norms else None)
    block, cache = Block(0, config, qkv.dtype, DEVICE, Linear), KVCache(config, context)
    cache.k, cache.v, cache.length = k[None], v[None], position
    if norms:
        block.q_norm, block.k_norm, _ = norms
    cos, sin, growth = (part[position] for part in rope)
    return block.attention(qkv[None], {"plain": (cos, sin, growth)}, cache, lambda x, linear: (
        qkv[None] if linear is block.qkv else x[0]))


@needs_kernels
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim, context, window",
    [(4, 2, 16, 300, None), (2, 2, 80, 300, None), (8, 2, 64, 600, 100),
     (6, 1, 128, 2049, None)],  # as many chunks as there can be
)
def test_attention(n_heads, n_kv_heads, head_dim, context, window):
    """Every length, one chunk and many, inside and outside the window; the cache gets the new key
    and value."""
    k, v = (torch.randn(n_kv_heads, context, head_dim, device=DEVICE) for _ in range(2))
    angles = torch.outer(torch.arange(context).float(), torch.rand(head_dim // 2)).to(DEVICE)
    rope = angles.cos(), angles.sin(), 1 + torch.rand(context, device=DEVICE)
    workspace = Workspace(n_heads, n_kv_heads, head_dim, DEVICE)
    head_norms = *torch.rand(2, head_dim, device=DEVICE), 1e-5
    for position, norms in zip((0, 63, 64, context - 1, context - 2), (None, head_norms) * 3):
        qkv = torch.randn((n_heads + 2 * n_kv_heads) * head_dim, device=DEVICE)
        if norms:
            qkv /= 300  # the norms' eps matters
        at, k_expected, v_expected = torch.tensor([position], device=DEVICE), k.clone(), v.clone()
        expected = attention_of_the_model(
            qkv, k_expected, v_expected, rope, position, n_heads, window, norms)
        for cache in (k, v):  # the new token's key and value, and those not yet written
            cache[:, position:] = float("nan")
        out = torch.full((n_heads * head_dim,), float("nan"), device=DEVICE)
        for sums in (workspace.sums, workspace.stats):  # counters stay as the last call left them
            sums.fill_(float("nan"))
        decode_attention(qkv, k, v, *rope, at, workspace, out, window, norms)
        assert (out - expected).abs().max() <= 2e-5
        for cache, before in ((k, k_expected), (v, v_expected)):
            cache[:, position + 1:] = before[:, position + 1:]
        assert torch.allclose(k, k_expected, atol=1e-6) and torch.equal(v, v_expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likeliest(dtype):
    """argmax over one chunk and many: the first of equals; -1 if a logit is infinite or NaN."""
    for n in (5, 1024, 3000):
        logits = torch.randn(n, device=DEVICE).to(dtype)
        for places in ((n - 1,), (n // 2, n - 1), (0, n // 2)):
            tied = logits.clone()
            tied[list(places)] = 9
            assert [likeliest(tied).item() for _ in range(2)] == [places[0]] * 2
        for bad in (float("nan"), float("inf"), -float("inf")):
            for place in (0, n - 1):
                spoilt = logits.clone()
                spoilt[place] = bad
                assert likeliest(spoilt).tolist() == [-1]

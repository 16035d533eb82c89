"""The fused decode step against the plain forward pass, on a GPU or in Triton's interpreter (see test_sparse_gemv.py)."""

import pytest
import torch

from decode import Decoder
from decode_attention import Workspace, decode_attention, decode_attention_reference
from generate import sample
from model import PROJECTIONS, SITES, Config, KVCache, Model
from sparse_gemv import INTERPRETED, sparse_gemv_reference

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")


@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim, context, window", [
    (4, 2, 16, 300, None), (3, 3, 24, 700, None), (8, 2, 64, 600, 100), (6, 1, 128, 700, None)])
def test_attention(n_heads, n_kv_heads, head_dim, context, window):
    """Every length, one chunk and many, inside and outside the window; the cache gets the new key and value."""
    k, v = (torch.randn(n_kv_heads, context, head_dim, device=DEVICE) for _ in range(2))
    angles = torch.outer(torch.arange(context).float(), torch.rand(head_dim // 2)).to(DEVICE)
    workspace = Workspace(n_heads, n_kv_heads, head_dim, DEVICE)
    for position in (0, 63, 64, context - 1):
        qkv = torch.randn((n_heads + 2 * n_kv_heads) * head_dim, device=DEVICE)
        at, out = torch.tensor([position], device=DEVICE), torch.empty(n_heads * head_dim, device=DEVICE)
        k_expected, v_expected = k.clone(), v.clone()
        expected = decode_attention_reference(qkv, k_expected, v_expected, angles.cos(), angles.sin(), position, window)
        for _ in range(2):  # the second time finds the workspace as the first left it
            decode_attention(qkv, k, v, angles.cos(), angles.sin(), at, workspace, out, window)
            assert (out - expected).abs().max() <= 2e-5
        assert torch.allclose(k, k_expected, atol=1e-6) and torch.equal(v, v_expected)


def random_model(config, quantize=None):
    model = Model(config, torch.float32, DEVICE, quantize)
    for name, shape in model.shapes.items():
        model.put(name, torch.randn(shape) * (1 if len(shape) == 1 else shape[-1] ** -0.5))
    return model


CONFIGS = {
    "llama": Config("llama", 101, 48, 80, 2, 6, 2, 16, context=160, tie_embeddings=True),
    "mistral": Config("mistral", 101, 64, 96, 2, 4, 4, 16, context=160, sliding_window=20),
    "qwen2": Config("qwen2", 101, 48, 80, 2, 3, 1, 16, context=160, qkv_bias=True),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("quantize", [None] + ["int8"] * (DEVICE == "cuda"))  # a CPU lays int8 weights out otherwise
def test_step(name, quantize):
    """Logits, tokens and counts of decode steps, dense and sparse, equal those of the plain forward pass."""
    config = CONFIGS[name]
    model, prompt = random_model(config, quantize), torch.randint(0, 101, (30,), device=DEVICE)
    for sparse in (False, True):
        thresholds = torch.rand(config.n_layers, 7) * 0.5 if sparse else torch.full((config.n_layers, 7), -1.0)
        kept = torch.zeros(config.n_layers, 7, dtype=torch.int64, device=DEVICE)

        def project(x, p):
            if p.layer is None:
                return sparse_gemv_reference(x, p.w_t, -1.0, scale=p.scale, bias=p.bias)[None]
            first = PROJECTIONS.index(SITES[p.site][0])
            columns = slice(first, first + len(p.ends))
            segments = list(zip(p.ends, thresholds[p.layer, columns].tolist()))
            return sparse_gemv_reference(x, p.w_t, segments, scale=p.scale, bias=p.bias,
                                         kept=kept[p.layer, columns])[None]

        ours, plain = (KVCache(config, 160, torch.float32, DEVICE) for _ in range(2))
        model.forward(prompt, ours), model.forward(prompt, plain)
        decoder = Decoder(model, ours, lambda logits: sample(logits, 0), graph=DEVICE == "cuda")
        decoder.thresholds.copy_(thresholds)
        decoder.start(7, len(prompt))
        token = torch.tensor([7], device=DEVICE)
        for _ in range(3):
            decoder.advance()
            logits = model.logits(model.forward(token, plain, project), project)[0]
            token = logits.argmax(keepdim=True)
            assert (decoder.logits - logits).abs().max() <= 1e-4 * logits.abs().max()
            assert decoder.token.tolist() == token.tolist()
        assert torch.equal(decoder.kept, kept)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_graph_and_kernels_choose_the_same_tokens():
    """Captured or kernel by kernel, greedy or drawn, again and again; the thresholds may change under the graph."""
    model = random_model(CONFIGS["llama"])
    for sampling in ((0, 0, 1.0), (0.8, 50, 0.95)):
        runs = []
        for graph in (True, True, False):
            generator = torch.Generator(DEVICE).manual_seed(3)
            cache = KVCache(model.config, 160, torch.float32, DEVICE)
            decoder = Decoder(model, cache, lambda logits: sample(logits, *sampling, generator), [generator], graph)
            decoder.start(5, 0)
            tokens = list(decoder.tokens(60))
            decoder.thresholds.fill_(0.3)
            decoder.start(tokens[-1], 60)
            runs.append(tokens + list(decoder.tokens(60)))
        assert runs[0] == runs[1] == runs[2]

"""The decode steps against the plain forward pass: on a CPU here, on a GPU, or in Triton's
interpreter.

test_sparse_gemv.py starts this file in the interpreter.
"""

import contextlib
import math

import pytest
import torch

import decode_attention as decode_attention_module
import sparse_gemv as sparse_gemv_module
from decode import CpuDecoder, GpuDecoder
from decode_attention import Workspace, decode_attention, decode_attention_reference
from dense_gemv import dense_gemv
from int8 import Int8Linear
from model import Config, KVCache, Linear, Model, masked
from sampling import sample
from sparse_gemv import INTERPRETED
from token_kernels import likeliest

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KERNELS = DEVICE == "cuda" or INTERPRETED
needs_kernels = pytest.mark.skipif(not KERNELS, reason="needs a GPU or TRITON_INTERPRET=1")


@needs_kernels
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim, context, window",
    [(4, 2, 16, 300, None), (3, 3, 24, 700, None), (8, 2, 64, 600, 100), (6, 1, 128, 700, None)],
)
def test_attention(n_heads, n_kv_heads, head_dim, context, window):
    """Every length, one chunk and many, inside and outside the window; the cache gets the new key
    and value."""
    k, v = (torch.randn(n_kv_heads, context, head_dim, device=DEVICE) for _ in range(2))
    angles = torch.outer(torch.arange(context).float(), torch.rand(head_dim // 2)).to(DEVICE)
    workspace = Workspace(n_heads, n_kv_heads, head_dim, DEVICE)
    for position in (0, 63, 64, context - 1):
        qkv = torch.randn((n_heads + 2 * n_kv_heads) * head_dim, device=DEVICE)
        at, out = (
            torch.tensor([position], device=DEVICE),
            torch.empty(n_heads * head_dim, device=DEVICE),
        )
        k_expected, v_expected = k.clone(), v.clone()
        expected = decode_attention_reference(
            qkv, k_expected, v_expected, angles.cos(), angles.sin(), position, window
        )
        for _ in range(2):  # the second time finds the workspace as the first left it
            decode_attention(qkv, k, v, angles.cos(), angles.sin(), at, workspace, out, window)
            assert (out - expected).abs().max() <= 2e-5
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


@needs_kernels
@pytest.mark.parametrize("k, n", [(48, 80), (600, 200), (2300, 70)])
def test_dense_gemv(k, n):
    """One tile and many, whole ones and parts, with RMSNorm, bias and residual; the same bits."""
    x, w_t = torch.randn(k, device=DEVICE), torch.randn(k, n, device=DEVICE)
    norm, bias, residual = (torch.randn(size, device=DEVICE) for size in (k, n, n))
    expected = torch.nn.functional.rms_norm(x, (k,), norm, 1e-5) @ w_t + bias + residual
    outs = []
    for _ in range(2):
        outs.append(torch.full((n,), float("nan"), device=DEVICE))
        kept = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        dense_gemv(x, w_t, outs[-1], norm=(norm, 1e-5), bias=bias, residual=residual, kept=kept)
        assert (outs[-1] - expected).norm() <= 1e-5 * expected.norm() and kept.item() == k
    assert torch.equal(*outs)


class Launch:
    """In a kernel's place: notes at each launch whether the device of its tensors was current."""

    def __init__(self, guarded, seen):
        self.guarded, self.seen = guarded, seen

    def __getitem__(self, grid):
        return lambda *tensors, **options: self.seen.append([*self.guarded])


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be that of the tensors (cuda:1)."""
    guarded, seen = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        guarded.append(tensor)
        yield
        guarded.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(sparse_gemv_module, "supports_pdl", lambda device: False)
    monkeypatch.setattr(sparse_gemv_module, "_select_kernel", Launch(guarded, seen))
    monkeypatch.setattr(sparse_gemv_module, "_sum_rows_kernel", Launch(guarded, seen))
    monkeypatch.setattr(sparse_gemv_module, "INTERPRETED", True)  # takes the GPU's way
    x = torch.randn(64)
    sparse_gemv_module.sparse_gemv(x, torch.randn(64, 32), 0.1)
    assert len(seen) == 2 and all(held[0].data_ptr() == x.data_ptr() for held in seen)

    monkeypatch.setattr(decode_attention_module, "_decode_attention_kernel",
                        Launch(guarded, seen))
    qkv, cache, out = torch.randn(3 * 16), torch.zeros(1, 8, 16), torch.empty(16)
    decode_attention(qkv, cache, cache.clone(), torch.ones(8, 8), torch.ones(8, 8),
                     torch.tensor([0]), Workspace(1, 1, 16, "cpu"), out)
    assert len(seen) == 3 and seen[2][0] is qkv and not guarded


def random_model(config, linear=Linear, device=DEVICE):
    model = Model(config, torch.float32, device, linear)
    for tensor in [model.norm] + [
        value for block in model.blocks for name, value in vars(block).items() if "norm" in name
    ]:
        tensor.normal_()
    for matrix in [*model.linears(), model.lm_head]:
        for i, width in enumerate(matrix.widths):
            weight = torch.randn(width, matrix.in_features) * matrix.in_features**-0.5
            matrix.load_weight(i, weight.to(device))
            if matrix.bias is not None:
                matrix.load_bias(i, torch.randn(width))
    if model.embedding is not None:
        model.embedding.normal_()
    return model


CONFIGS = {
    "llama": Config(101, 48, 80, 2, 6, 2, 16, context=160, tie_embeddings=True),
    "mistral": Config(101, 64, 96, 2, 4, 4, 16, context=160, sliding_window=20),
    "qwen3": Config(101, 48, 80, 2, 3, 1, 24, context=160, qk_norm="head"),
    "phi-4-mini": Config(101, 48, 80, 2, 6, 2, 16, context=160, rope_factor=1.2,
                         rope_divisors=(1, 1, 1, 2, 4, 8, math.inf, math.inf)),
    "smollm3": Config(101, 48, 80, 2, 6, 2, 16, context=160, no_rope_layers=(1,)),
    "olmo2": Config(101, 48, 80, 2, 6, 2, 16, context=160, qk_norm="all", norms_behind=True),
    "qwen2": Config(101, 48, 80, 2, 3, 1, 16, context=160, qkv_bias=True),
}


def run_kernels(decoder, n):
    """`decoder.tokens`, but for the pinned memory that the interpreter's machine may lack."""
    for _ in range(n):
        decoder.advance()
        yield decoder.token.item()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "linear", [Linear] + [Int8Linear] * (not INTERPRETED)
)  # a CPU packs int8
def test_step(name, linear):
    """Logits, tokens and counts of decode steps, dense and sparse, equal the plain forward
    pass's."""
    config = CONFIGS[name]
    model, prompt = random_model(config, linear), torch.randint(0, 101, (30,), device=DEVICE)
    for sparse in (False, True):
        thresholds = torch.full((config.n_layers, 7), -1.0)
        if sparse:
            thresholds = torch.rand(config.n_layers, 7) * 0.5
        expected_kept = torch.zeros(config.n_layers, 7, dtype=torch.int64)

        def project(x, p):
            for place in range(7)[p.places]:
                t = thresholds[p.layer, place]
                expected_kept[p.layer, place] += int((~(x.float().abs() <= t)).sum())
            return masked(x, p, thresholds[p.layer, p.places].to(x.device))

        ours, plain = (KVCache(config, 160, torch.float32, DEVICE) for _ in range(2))
        model.forward(prompt, ours), model.forward(prompt, plain)
        seen = []

        def choose(logits):
            seen.append(logits.clone())
            return sample(logits, 0)

        if KERNELS:
            decoder = GpuDecoder(model, ours, choose, graph=False)
        else:
            decoder = CpuDecoder(model, ours, choose)
        decoder.set_thresholds(thresholds)
        decoder.start(7, len(prompt))
        token = torch.tensor([7], device=DEVICE)
        for chosen in run_kernels(decoder, 3) if KERNELS else decoder.tokens(3):
            logits = model.logits(model.forward(token, plain, project))[0]
            token = logits.argmax(keepdim=True)
            assert (seen.pop(0) - logits).abs().max() <= 1e-4 * logits.abs().max()
            assert chosen == token.item()
        assert decoder.n_steps == 3
        assert torch.equal(decoder.kept.cpu(), expected_kept)
        assert (
            expected_kept.sum() < 3 * sum(p.in_features * len(p.ends) for p in model.linears())
        ) == sparse


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_graph_and_kernels_choose_the_same_tokens():
    """Captured or kernel by kernel, greedy or drawn, again and again; the thresholds may change
    under the graph."""
    model = random_model(CONFIGS["llama"])
    for sampling in ((0, 0, 1.0), (0.8, 50, 0.95)):
        runs = []
        for graph in (True, True, False):
            generator = torch.Generator(DEVICE).manual_seed(3)
            cache = KVCache(model.config, 160, torch.float32, DEVICE)
            decoder = GpuDecoder(
                model,
                cache,
                lambda logits: sample(logits, *sampling, generator),
                [generator],
                graph,
            )
            decoder.start(5, 0)
            tokens = list(decoder.tokens(60))
            decoder.set_thresholds(torch.full((2, 7), 0.3))
            decoder.start(tokens[-1], 60)
            runs.append(tokens + list(decoder.tokens(60)))
        assert runs[0] == runs[1] == runs[2]

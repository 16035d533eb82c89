"""The decode steps against the plain forward pass: on a CPU here, on a GPU, or in Triton's
interpreter.

test_sparse_gemv.py starts this file in the interpreter.
"""

import contextlib
import math
import random
import types
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import decode
import sparse_gemv
from decode import CpuDecoder, GpuDecoder
from gpu import (
    decode_attention,
    dense_gemv,
    gpu_gemv,
    head_gemv,
    tensor_gemv,
    token_kernels,
)
from gpu.decode_attention import Workspace, decode_attention_reference
from gpu.token_kernels import likeliest
from model import Config, KVCache, Linear, Model, masked
from quantize import Int8Linear
from sampling import sample
from sparse_gemv import INTERPRETED
from test_sparse_gemv import SEED, TOLERANCE, error, reference

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KERNELS = DEVICE == "cuda" or INTERPRETED
needs_kernels = pytest.mark.skipif(not KERNELS, reason="needs a GPU or TRITON_INTERPRET=1")


def test_chunks_of_attention_are_a_power_of_two():
    """A tile of all chunks needs that."""
    for n_kv_heads in range(1, 500):
        splits = Workspace(n_kv_heads, n_kv_heads, 1, "cpu").splits
        assert splits in (4, 8, 16, 32) and splits >= min(32, 384 // n_kv_heads)


@needs_kernels
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim, context, window",
    [(4, 2, 16, 300, None), (3, 3, 24, 700, None), (8, 2, 64, 600, 100), (6, 1, 128, 700, None),
     (2, 1, 16, 4100, None)],  # as many chunks as there can be
)
def test_attention(n_heads, n_kv_heads, head_dim, context, window):
    """Every length, one chunk and many, inside and outside the window; the cache gets the new key
    and value."""
    k, v = (torch.randn(n_kv_heads, context, head_dim, device=DEVICE) for _ in range(2))
    angles = torch.outer(torch.arange(context).float(), torch.rand(head_dim // 2)).to(DEVICE)
    rope = angles.cos(), angles.sin(), 1 + torch.rand(context, device=DEVICE)
    workspace = Workspace(n_heads, n_kv_heads, head_dim, DEVICE)
    head_norms = *torch.rand(2, head_dim, device=DEVICE), 1e-5
    for position, norms in zip((0, 63, 64, context - 1, 64), (None,) * 4 + (head_norms,)):
        qkv = torch.randn((n_heads + 2 * n_kv_heads) * head_dim, device=DEVICE)
        if norms:
            qkv /= 300  # the norms' eps matters
        at, out = (
            torch.tensor([position], device=DEVICE),
            torch.empty(n_heads * head_dim, device=DEVICE),
        )
        k_expected, v_expected = k.clone(), v.clone()
        expected = decode_attention_reference(
            qkv, k_expected, v_expected, *rope, position, window, norms
        )
        for _ in range(2):  # the second time finds the counters as the first left them
            for left in out, workspace.sums, workspace.stats:
                left.fill_(math.nan)
            decode_attention.decode_attention(
                qkv, k, v, *rope, at, workspace, out, window, norms)
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
        dense_gemv.dense_gemv(
            x, w_t, outs[-1], norm=(norm, 1e-5), bias=bias, residual=residual, kept=kept)
        assert (outs[-1] - expected).norm() <= 1e-5 * expected.norm() and kept.item() == k
    assert torch.equal(*outs)


@needs_kernels
@pytest.mark.parametrize("k, n", [(48, 80), (600, 256), (2300, 72)])
@pytest.mark.parametrize("fused", ["norm", "swiglu", None])
def test_dense_products_on_tensor_cores(k, n, fused):
    """As above, in bfloat16. A NaN in x stays visible."""
    def random(*size):
        return torch.randn(size, device=DEVICE).bfloat16()

    x, w_t, bias, residual = random(2 * k if fused == "swiglu" else k), random(k, n), *random(2, n)
    norm, inputs = (random(k), 1e-5) if fused == "norm" else None, x.double()
    if fused == "swiglu":
        inputs = torch.nn.functional.silu(inputs[:k]) * inputs[k:]
    if fused == "norm":
        x /= 300  # the norm's eps matters
        inputs = torch.nn.functional.rms_norm(x.double(), (k,), norm[0].double(), 1e-5)
    expected = inputs @ w_t.double() + bias + residual
    outs, kept = [], torch.zeros(1, dtype=torch.int64, device=DEVICE)
    options = {"norm": norm, "swiglu": fused == "swiglu", "bias": bias, "residual": residual}
    for times in (1, 2):
        outs.append(torch.full((n,), float("nan"), dtype=x.dtype, device=DEVICE))
        tensor_gemv.tensor_gemv(x, w_t, None, outs[-1], kept=kept, **options)
        assert (outs[-1] - expected).norm() <= 1e-2 * expected.norm() and kept.item() == times * k
    assert torch.equal(*outs)
    x[k // 2] = float("nan")
    tensor_gemv.tensor_gemv(x, w_t, None, outs[0], **options)
    assert outs[0].isnan().all()


@pytest.mark.parametrize("k, n", [(2304, 4096), (4100, 2100), (11008, 4096), (129, 64)])
def test_every_program_on_tensor_cores_has_rows(k, n, monkeypatch):
    """One without would never wait for the kernel in front, and finish before it."""
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **options: launches.append((grid, options))

    monkeypatch.setattr(tensor_gemv, "_kernel", Kernel())
    monkeypatch.setattr(tensor_gemv, "supports_pdl", lambda device: False)
    x, w_t, out = (torch.empty(size, dtype=torch.bfloat16) for size in ((k,), (k, n), (n,)))
    tensor_gemv.tensor_gemv(x, w_t, None, out)
    ((tiles, splits), options), = launches
    assert tiles * options["BLOCK_N"] >= n and splits == options["SPLITS"]
    assert (splits - 1) * options["CHUNK"] < k <= splits * options["CHUNK"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("int4", [False, True])
def test_weights_are_asked_for_before_x_and_x_is_not(int4):
    """Compiled for a Hopper GPU, a dense product on tensor cores has its first weights on their way
    to shared memory when it waits for the kernel in front. What x depends on comes behind."""
    kernel = tensor_gemv._kernel
    types = {"x_ptr": "*bf16", "norm_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16",
             "sums_ptr": "*fp32", "squares_ptr": "*fp32", "finished_ptr": "*i32",
             "residual_ptr": "*bf16", "eps": "fp32"}
    if int4:
        types |= {"w_ptr": "*i32", "groups_ptr": "*i32"}
    constants = {name: None for name in kernel.arg_names if name not in types} | {
        "K": 4096, "N": 4096, "END0": 4096, "END1": 4096, "SEGMENTS": 1, "CHUNK": 512,
        "SPLITS": 8, "SWIGLU": False, "PARTS": 2, "BLOCK_N": 256 if int4 else 128, "BLOCK_K": 64,
        "STAGES": 3, "PDL": True}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]]
               for name in types if name != "eps"}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned),
                              target=GPUTarget("cuda", 90, 32),
                              options={"num_warps": 4, "launch_pdl": True})
    before, _, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
    assert "cp.async.cg" in before and "cp.async.commit_group" in before
    assert "ld.global" not in before and "ld.global" in after and "mma.sync" in after


@pytest.mark.parametrize("dtype, k, n, dense, sparse", [
    (torch.bfloat16, 2112, 2112, "tensor_gemv", "dense_gemv"),
    (torch.bfloat16, 2112, 2080, "tensor_gemv", "sparse_gemv"),
    (torch.bfloat16, 2048, 16384, "dense_gemv", "sparse_gemv"),
    (torch.float32, 2112, 2112, "dense_gemv", "dense_gemv"),
    (torch.float32, 8192, 2048, "dense_gemv", "sparse_gemv"),
    (torch.int8, 64, 64, "sparse_gemv", "sparse_gemv"),
    (torch.uint8, 64, 64, "tensor_gemv", "tensor_gemv")])
def test_which_kernel(dtype, k, n, dense, sparse, monkeypatch):
    """`gpu_gemv` passes everything on; with thresholds, to a kernel that takes them."""
    calls = []
    for name in ("sparse_gemv", "dense_gemv", "tensor_gemv"):
        monkeypatch.setattr(gpu_gemv, name, lambda *a, name=name, **o: calls.append((name, a, o)))
    x = torch.empty(k, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    w_t, out, thresholds = torch.empty(k, n, dtype=dtype), torch.empty(n), torch.zeros(1)
    scale = torch.ones(n) if dtype.itemsize == 1 else None
    gpu_gemv.gpu_gemv(x, w_t, None, out, bias=out, scale=scale)
    gpu_gemv.gpu_gemv(x, w_t, thresholds, out, bias=out, scale=scale)
    assert [name for name, _, _ in calls] == [dense, sparse]
    for _, arguments, options in calls:
        assert options["bias"] is out and options.get("scale") is scale
        assert arguments[:2] == (x, w_t)
        assert any(each is out for each in (*arguments, *options.values()))
    assert any(each is thresholds for each in (*calls[1][1], *calls[1][2].values()))


def leveled(k):
    """Numbers around 1, 2, 3 and 4 of random sign: no rounding moves one past 1.5, 2.5 or 3.5."""
    signs = torch.randint(0, 2, (k,)) * 2 - 1
    return (signs * torch.randint(1, 5, (k,)) * (1 + 0.1 * torch.rand(k))).to(DEVICE)


def draw_masked(rng, k, ends, dtype, form):
    """x, w_t, thresholds and options of a sparse product, its values on both sides of thresholds.

    A matrix's dropped rows are NaN or infinite.
    """
    n, x, options = ends[-1], leveled(k), {"ends": ends}
    thresholds = torch.tensor([rng.choice([-1.0, 1.5, 2.5, 3.5, 9.0]) for _ in ends]).to(DEVICE)
    levels = x
    # x and weights are rounded later: still no value is within 3% of a threshold
    if form == "swiglu":
        gate = 1 + torch.rand(k, device=DEVICE)
        x = torch.cat((gate, x / torch.nn.functional.silu(gate)))
    if form == "norm":
        weight = torch.randn(k, device=DEVICE).sign() * (1 + 0.02 * torch.rand(k, device=DEVICE))
        options["norm"] = weight.to(dtype), 1e-5
        levels = torch.nn.functional.rms_norm(x, (k,), weight, 1e-5)
        thresholds *= k**0.5 / x.norm()
    w_t = torch.randn(k, n, device=DEVICE).to(dtype)
    for t, start, end in zip(thresholds, (0, *ends), ends):
        dropped = (levels.abs() <= t).nonzero().view(-1)
        w_t[dropped, start:end] = float("nan")
        w_t[dropped[::2], start:end] = float("inf")
    for name in ("bias", "residual"):
        if rng.random() < 0.5:
            options[name] = torch.randn(n, device=DEVICE).to(dtype)
    return x.to(dtype), w_t, thresholds, options


@needs_kernels
def test_masked_gemv():
    """Random draws against float64 and the counts of `sparse_gemv`: rows of any number, one split
    and many, up to three matrices with thresholds of their own. Dropped rows are never read; the
    same bits twice."""
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    sizes = [(k, ends) for k in (1, 33, 64, 200, 577, 1100) for ends in ((64,), (64, 192, 256))]
    sizes += [(129, (128, 192)), (6300, (64,)), (2300, (128,))]
    for k, ends in sizes:
        for form in ("plain", "norm", "swiglu"):
            dtype = rng.choice([torch.float32, torch.bfloat16])
            x, w_t, thresholds, options = draw_masked(rng, k, ends, dtype, form)
            counts = [torch.full((len(ends),), 7, device=DEVICE) for _ in range(4)]
            expected = reference(
                x, w_t, thresholds, swiglu=form == "swiglu", kept=counts[0], **options)
            options["swiglu"] = form == "swiglu"
            sparse_gemv.sparse_gemv(x, w_t, thresholds, kept=counts[1], **options)
            outs = []
            for kept in counts[2:]:
                outs.append(torch.full((ends[-1],), float("nan"), dtype=dtype, device=DEVICE))
                assert outs[-1] is dense_gemv.dense_gemv(
                    x, w_t, outs[-1], thresholds=thresholds, kept=kept, **options)
            case = SEED, k, ends, form, dtype
            fused = 1 if form == "plain" else 2  # x is rounded too
            assert error(outs[0], expected) <= fused * TOLERANCE[dtype], case
            assert torch.equal(*outs), case
            assert all(torch.equal(count, counts[0]) for count in counts), case


@needs_kernels
def test_masked_gemv_spreads_nan_and_infinity():
    """As in dense arithmetic where they are kept, and not at all where they are dropped."""
    x, w_t = leveled(200), torch.rand(200, 128, device=DEVICE) + 1
    thresholds = torch.tensor([1.5, 2.5], device=DEVICE)

    def product():
        out = torch.full((128,), float("nan"), device=DEVICE)
        return dense_gemv.dense_gemv(x, w_t, out, thresholds=thresholds, ends=(64, 128))

    x[9], w_t[9, :64], w_t[9, 64:] = 1.5, float("nan"), 1.0  # a tie is dropped
    x[150], w_t[150] = 2.0, float("inf")  # kept by the first matrix alone
    out = product()
    assert (out[:64] == float("inf")).all() and out[64:].isfinite().all()
    x[150] = float("-inf")
    assert (product() == -float("inf")).all()
    thresholds[1] = float("inf")  # |x| <= infinity is dropped
    out = product()
    assert (out[:64] == -float("inf")).all() and (out[64:] == 0).all()
    x[150] = float("nan")  # not (|nan| <= t): kept
    assert product().isnan().all()


def test_one_kernel_pays_for_few_rows():
    """On the shapes that were timed: Llama-3.2-1B, Llama-2-7B, Llama-3-8B."""
    def pays(k, *ends, dtype=torch.bfloat16):
        x = torch.empty(k, dtype=torch.bfloat16, device="meta")
        w_t = torch.empty(k, ends[-1], dtype=dtype, device="meta")
        return dense_gemv.one_kernel_pays(x, w_t, ends)

    assert pays(2048, 2048, 2560, 3072) and pays(2048, 2048)
    assert pays(4096, 4096, 5120, 6144) and pays(4096, 4096)
    assert not pays(4096, 4096, 8192, 12288) and not pays(2048, 8192, 16384)
    assert not pays(8192, 2048) and not pays(14336, 4096)
    assert not pays(2048, 2000, 2048) and not pays(2048, 2080)  # a tile within one matrix
    assert not pays(2048, 2048, dtype=torch.int8) and not pays(2048, 2048, dtype=torch.uint8)


# ---- the device: Triton launches on the current one, which need not be that of the tensors ------


@pytest.fixture
def guard(monkeypatch):
    """Kernels that only note (name, address of the tensor whose device was made the current one);
    everything lies on a CPU and takes the GPU's way."""
    held, notes = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        held.append(tensor.data_ptr())
        yield
        held.pop()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: notes.append((self.name, held[-1] if held else None))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (sparse_gemv, dense_gemv, tensor_gemv, head_gemv, decode_attention,
                   token_kernels, decode):
        if hasattr(module, "supports_pdl"):
            monkeypatch.setattr(module, "supports_pdl", lambda device: False)
        if hasattr(module, "INTERPRETED"):
            monkeypatch.setattr(module, "INTERPRETED", True)
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            short = module.__name__.removeprefix("gpu.")
            monkeypatch.setattr(module, name, Kernel(f"{short}.{name}"))
    return types.SimpleNamespace(held=held, notes=notes)


def test_kernels_are_launched_on_the_device_of_their_tensors(guard):
    """Each public function by itself, for somebody may have copied its file."""
    x, w_t, out, one = torch.randn(64), torch.randn(64, 32), torch.empty(32), torch.zeros(1)
    model = random_model(CONFIGS["mistral"], device="cpu")
    cache = torch.zeros(1, 8, 16)
    calls = {
        "sparse_gemv": lambda: sparse_gemv.sparse_gemv(x, w_t, 0.1),
        "dense_gemv": lambda: dense_gemv.dense_gemv(x, w_t, out),
        "tensor_gemv": lambda: tensor_gemv.tensor_gemv(
            x, torch.zeros(64, 16, dtype=torch.uint8), one, out, ends=(32,),
            scale=torch.zeros(64, 1, 2, dtype=torch.bfloat16)),
        "head_gemv": lambda: head_gemv.Head(model.lm_head, (model.norm, 1e-5), 1)(
            x[:48], torch.empty(101)),
        "decode_attention": lambda: decode_attention.decode_attention(
            x[:48], cache, cache.clone(), torch.ones(8, 8), torch.ones(8, 8), torch.ones(8),
            one.long(),
            Workspace(1, 1, 16, "cpu"), out[:16]),
        "token_kernels": lambda: (token_kernels.embed(model, one.long(), one.long(), x),
                                  token_kernels.likeliest(x)),
    }
    for module, call in calls.items():
        call()
        names = {name for name, _ in guard.notes}
        assert names == {f"{module}.{name}" for name in vars(globals()[module])
                         if name.endswith("_kernel")}
        assert {place for _, place in guard.notes} == {x.data_ptr()} and not guard.held, module
        guard.notes.clear()


def test_the_decoder_captures_replays_and_records_on_its_device(guard, monkeypatch):
    """Else tokens could be read before they are written."""
    def watched(name, result=mock.DEFAULT):
        def note(*arguments, **options):
            assert guard.held == [decoder.x.data_ptr()], name
            guard.notes.append((name, decoder.x.data_ptr()))
            return result
        return note

    for name in ("Stream", "CUDAGraph", "stream", "graph", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock(side_effect=watched(name)))
    torch.cuda.Event.side_effect = None
    torch.cuda.Event.return_value.record.side_effect = watched("record")
    torch.cuda.CUDAGraph.return_value.replay.side_effect = watched("replay")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(
        *size, **options))
    model = random_model(CONFIGS["llama"], device="cpu")
    decoder = GpuDecoder(model, KVCache(model.config, 160), token_kernels.likeliest)
    decoder.start(5, 0)
    list(decoder.tokens(3))
    decoder.set_thresholds(torch.full((2, 7), 0.3))
    names = [name for name, _ in guard.notes]
    assert names.count("graph") == 2 and names.count("replay") == names.count("record") == 3
    assert {"Stream", "stream", "current_stream", "dense_gemv._dense_kernel",
            "sparse_gemv._sum_rows_kernel"} <= set(names)
    assert all(place is not None for _, place in guard.notes) and not guard.held


def test_what_a_trial_step_changes_is_put_back(guard, monkeypatch):
    """Token, position, counts and random state are those of before a capture."""
    for name in ("Stream", "CUDAGraph", "stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    generator, model = torch.Generator().manual_seed(3), random_model(
        CONFIGS["llama"], device="cpu")
    decoder, steps = GpuDecoder(model, KVCache(model.config, 160), None, [generator]), []
    state = {"token": 5, "position": 7, "kept": 2}

    def step():
        steps.append(decoder.position.item())
        for name in state:
            getattr(decoder, name).add_(1)
        torch.rand(3, generator=generator)

    decoder.step = step
    for name, value in state.items():
        getattr(decoder, name).fill_(value)
    decoder.capture()
    for name, value in state.items():
        assert (getattr(decoder, name) == value).all(), name
    assert torch.equal(torch.rand(9, generator=generator),
                       torch.rand(9, generator=torch.Generator().manual_seed(3)))
    assert len(steps) == 3 and steps[1] == 158  # the cache's last rows


@pytest.mark.parametrize("int8", [False, True])
def test_sparse_products_take_one_kernel_or_two(guard, int8):
    """Two for the last of four, with seven tiles of 64 rows a program, and for all in int8."""
    model = random_model(Config(101, 64, 6208, 1, 4, 2, 32, context=160), device="cpu")
    for linear in model.linears() if int8 else ():
        linear.w_t, linear.scale = linear.w_t.to(torch.int8), torch.ones(linear.ends[-1])
    decoder = GpuDecoder(model, KVCache(model.config, 160), token_kernels.likeliest, graph=False)
    one = ["dense_gemv._dense_kernel"]
    two = ["sparse_gemv._select_kernel", "sparse_gemv._sum_rows_kernel"]
    for t in (-1.0, 0.3):
        decoder.set_thresholds(torch.full((1, 7), t))
        guard.notes.clear()
        decoder.step()
        products = [name for name, _ in guard.notes if name.startswith(("dense", "sparse"))]
        if int8:
            assert products == 4 * two
        else:
            assert products == 3 * one + (one if t < 0 else two)


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
    "ministral3": Config(101, 48, 80, 2, 6, 2, 16, context=160, query_growth=(0.9, 8)),
    "olmo3": Config(101, 48, 80, 2, 6, 2, 16, context=160, qk_norm="all", norms_behind=True,
                    sliding_window=20, full_layers=(1,), rope_divisors=(1, 1, 1, 2, 4, 8, 8, 8),
                    rope_factor=1.2),
    "qwen3": Config(101, 48, 80, 2, 3, 1, 24, context=160, qk_norm="head"),
    "phi-4-mini": Config(101, 48, 80, 2, 6, 2, 16, context=160, rope_factor=1.2,
                         rope_divisors=(1, 1, 1, 2, 4, 8, math.inf, math.inf)),
    "smollm3": Config(101, 48, 80, 2, 6, 2, 16, context=160, no_rope_layers=(1,)),
    "olmo2": Config(101, 48, 80, 2, 6, 2, 16, context=160, qk_norm="all", norms_behind=True),
    # products of one kernel and of two: 64 columns divide all matrices but gate and up
    "both forms": Config(101, 64, 96, 2, 4, 2, 32, context=160),
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
    """Captured or kernel by kernel, greedy or drawn, they choose the tokens of the plain forward
    pass; the thresholds may change under the graph."""
    torch.manual_seed(0)
    model = random_model(CONFIGS["llama"])
    tables, counts = [torch.full((2, 7), t, device=DEVICE) for t in (-1.0, 0.3)], []
    for sampling in ((0, 0, 1.0), (0.8, 50, 0.95)):
        expected, cache = [5], KVCache(model.config, 160, torch.float32, DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(3)
        for i in range(120):
            def project(x, linear):
                return masked(x, linear, tables[i // 60][linear.layer, linear.places])

            token = torch.tensor(expected[-1:], device=DEVICE)
            logits = model.logits(model.forward(token, cache, project))[0]
            expected.append(sample(logits, *sampling, generator=generator).item())
        for graph in (True, True, False):
            generator = torch.Generator(DEVICE).manual_seed(3)
            cache = KVCache(model.config, 160, torch.float32, DEVICE)
            decoder = GpuDecoder(
                model,
                cache,
                lambda logits: sample(logits, *sampling, generator=generator),
                [generator],
                graph,
            )
            tokens = [5]
            for table in tables:
                decoder.set_thresholds(table)
                decoder.start(tokens[-1], len(tokens) - 1)
                tokens += decoder.tokens(60)
            assert tokens == expected
            counts.append(decoder.kept.tolist())
            assert counts[-1] == counts[len(counts) - 1 - (len(counts) - 1) % 3]  # in every way
            assert decoder.graphs is None or decoder.graphs.keys() == {False, True}

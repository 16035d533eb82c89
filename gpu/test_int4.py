"""Tests of 4-bit weights: the rounding, and the products against float64 in Triton's interpreter
(the last test starts it in a process of its own) or on a GPU."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
import triton

import checkpoint
import quantize
from checkpoint.test_checkpoint import CONFIG, weights, write_folder
from gpu import benchmark_gpu
from gpu.tensor_gemv import GROUP, tensor_gemv
from model import dense
from quantize import Int4Linear, Int4OnCPU, Int8Linear, dequantize, quantize_int4, split_groups
from session import bytes_per_weight
from sparse_gemv import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KERNELS = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a GPU")
SEED = random.SystemRandom().randrange(2**32)


@pytest.fixture(autouse=True)
def seed():
    print("seed", SEED)
    torch.manual_seed(SEED)


def rounded(weight):
    """Weights [N, K] -> (w_t, scale) as an `Int4Linear` holds them."""
    return [part.contiguous() for part in split_groups(quantize_int4(weight))]


def to_nearest(weight):
    """Weights [N, K] rounded between the extremes of each group, without a search."""
    w = weight.T.float().reshape(weight.shape[1], -1, 32)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = (high - low) / 15
    return (((w - low) / scale).round() * scale + low).flatten(1).T


@pytest.mark.parametrize("n, k", [(96, 400), (4096, 300)])
def test_the_search_is_better_than_rounding_to_nearest(n, k):
    """And better than one fit to the whole range, which reaches 0.96 and 0.84."""
    for weight, share in ((torch.randn(n, k), 0.945), (torch.randn(n, k) ** 3, 0.81)):
        w_t, scale = rounded(weight)
        assert w_t.dtype == torch.uint8 and w_t.shape == (k, n // 2)
        assert scale.dtype == torch.bfloat16 and scale.shape == (k, n // 32, 2)
        error = (dequantize(w_t, scale).T - weight).norm()
        assert error < share * (to_nearest(weight) - weight).norm()


def test_what_int4_can_hold_stays_exactly():
    q = torch.arange(16).repeat(2)[torch.randperm(32)]
    weight = (q * 0.25 - 2)[:, None]
    assert torch.equal(dequantize(*rounded(weight)).T, weight)
    for constant in (0.0, 0.5, -3.0):
        weight = torch.full((64, 3), constant)
        assert torch.equal(dequantize(*rounded(weight)).T, weight)


def test_where_a_group_lies():
    """Group g of channel k holds columns 32 g ... 32 g + 31: 16 bytes, then scale and minimum."""
    q = torch.rand(3, 5, 32).argsort(-1) % 16  # [groups, channels, columns]
    groups = quantize_int4((q * 0.25 - 2).transpose(1, 2).reshape(96, 5))
    assert groups.dtype == torch.uint8 and groups.shape == (3, 5, 20)
    assert torch.equal(torch.cat((groups[..., :16] & 15, groups[..., :16] >> 4), -1), q)
    scales = groups[..., 16:].contiguous().view(torch.bfloat16)
    assert torch.equal(scales.float(), torch.tensor([0.25, -2.0]).expand(3, 5, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    weight = torch.zeros(32, 4)
    for weight[5, 2] in (value, 3e38):  # with 3e38, sums of weights overflow
        weight[6, 2] = -weight[5, 2]
        with pytest.raises(ValueError, match="tensor up holds weights that are infinite, NaN or"):
            quantize_int4(weight, "up")
    tensors = weights()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight"):
        checkpoint.load(write_folder(tmp_path / "source", tensors=tensors), quantize="int4")


def test_a_cpu_runs_the_rounded_weights_as_int8(tmp_path):
    source = write_folder(tmp_path / "source")
    model, _ = checkpoint.load(source, quantize="int4")
    plain, _ = checkpoint.load(source)
    kinds = set()
    for ours, other in zip(model.linears(), plain.linears()):
        kinds.add(type(ours))
        w = other.weight(0, other.ends[-1]).T
        if isinstance(ours, Int4OnCPU):
            w = torch.cat([dequantize(*rounded(part)).T for part in w.split(ours.widths)])
        step = w.abs().amax(1) / 127
        off = (ours.weight(0, ours.ends[-1]).T - w).abs().amax(1)
        assert (off <= 0.51 * step).all()
    assert Int4OnCPU in kinds and isinstance(model.lm_head, Int8Linear)


@pytest.mark.parametrize("n_groups", [1, 2, 1000])
def test_stored_groups_are_read_in_pieces(n_groups, monkeypatch):
    """They give a CPU what rounding while loading gives, in as many pieces as there may be."""
    monkeypatch.setattr(quantize, "PIECE", n_groups * 50 * GROUP)
    ours, stored = (Int4OnCPU(0, "qkv", 50, (96, 32, 64), False, torch.float32, "cpu")
                    for _ in range(2))
    for i, width in enumerate(ours.widths):
        weight = torch.randn(width, 50)
        ours.load_weight(i, weight)
        stored.load_weight(i, quantize_int4(weight))
    assert torch.equal(ours.weight(0, 192), stored.weight(0, 192))


def test_columns_that_are_no_multiple_of_32_are_int8(tmp_path):
    config = CONFIG | {"intermediate_size": 100}
    model, _ = checkpoint.load(write_folder(tmp_path / "m", config, weights(config)),
                               quantize="int4")
    assert type(model.blocks[0].gate_up) is Int8Linear
    assert type(model.blocks[0].down) is Int4OnCPU


def test_dense_products():
    linear = Int4Linear(0, "qkv", 50, (96, 32, 64), True, torch.float32, DEVICE)
    for i, width in enumerate(linear.widths):
        linear.load_weight(i, torch.randn(width, 50, device=DEVICE))
        linear.load_bias(i, torch.randn(width, device=DEVICE))
    x = torch.randn(20, 50, device=DEVICE)
    wanted = x.double() @ dequantize(linear.w_t, linear.scale).double() + linear.bias
    torch.testing.assert_close(dense(x, linear).double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear.weight(96, 192), dequantize(linear.w_t, linear.scale)[:, 96:])
    assert bytes_per_weight(linear) * 50 * 192 == linear.w_t.nbytes + linear.scale.nbytes


@KERNELS
def test_random_draws():
    """200 draws of sizes, types, thresholds and fused forms, against float64; some are dense."""
    rng = random.Random(SEED)
    for _ in range(200):
        k = rng.choice([1, 7, 33, 64, 100, 256, 577])
        ends = rng.choice([(32,), (96,), (160,), (32, 64), (64, 96, 128), (128, 160, 288)])
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        n, swiglu = ends[-1], rng.random() < 0.3
        w_t, scale = rounded(torch.randn(n, k, device=DEVICE))
        x = torch.randn(k * (1 + swiglu), device=DEVICE).to(dtype)
        input_ = x
        if swiglu:
            gate, up = x.float().chunk(2)
            input_ = (F.silu(gate) * up).to(dtype)
        magnitude = input_.float().abs().sort().values
        # Thresholds lie between two values, so that no rounding decides what is kept.
        at = [rng.randrange(k) for _ in ends]
        t = torch.tensor([magnitude[i].item() * 0.98 if rng.random() < 0.9 else -1.0 for i in at],
                         device=DEVICE)
        if swiglu:
            t.fill_(rng.choice([-1.0, 1e9]))
        dense = rng.random() < 0.3
        if dense:
            t.fill_(-1)
        bias, residual = (torch.randn(n, device=DEVICE).to(dtype) for _ in range(2))
        kept = torch.zeros(len(ends), dtype=torch.int64, device=DEVICE)
        out = torch.full((n,), float("nan"), dtype=dtype, device=DEVICE)
        tensor_gemv(x, w_t, None if dense else t, out, ends=ends, scale=scale, bias=bias,
                    swiglu=swiglu, residual=residual, kept=kept)
        w, wanted, start = dequantize(w_t, scale).double(), [], 0
        for i, end in enumerate(ends):
            keep = ~(input_.float().abs() <= t[i])
            assert kept[i] == keep.sum()
            wanted.append(input_[keep].double() @ w[keep, start:end])
            start = end
        wanted = torch.cat(wanted) + bias.double() + residual.double()
        tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        size = max(wanted.norm(), (input_.double() ** 2 @ w ** 2).sqrt().norm())
        assert (out.double() - wanted).norm() <= tolerance * size, (k, ends, dtype, swiglu, dense)


@KERNELS
def test_norm_split_and_dropped_rows():
    k, n = 1024, 96  # K is split here
    w_t, scale = rounded(torch.randn(n, k, device=DEVICE))
    x, weight = torch.randn(k, device=DEVICE), torch.rand(k, device=DEVICE)
    normed = F.rms_norm(x, (k,), weight, 1e-5)
    keep = normed.abs() > 0.3
    scale[~keep] = float("nan")  # never read
    outs = [torch.empty(n, device=DEVICE) for _ in range(3)]
    for out in outs:
        tensor_gemv(x, w_t, torch.tensor([0.3], device=DEVICE), out, ends=(n,), scale=scale,
                    norm=(weight, 1e-5))
    wanted = normed[keep].double() @ dequantize(w_t[keep], scale[keep]).double()
    assert (outs[0] - wanted).norm() <= 1e-5 * wanted.norm()
    assert all(torch.equal(out, outs[0]) for out in outs)
    scale.nan_to_num_(1.0)
    x /= 300  # the norm's eps matters now
    normed = F.rms_norm(x, (k,), weight, 1e-5)
    for out in outs:
        tensor_gemv(x, w_t, None, out, norm=(weight, 1e-5), ends=(n,), scale=scale)
    wanted = normed.double() @ dequantize(w_t, scale).double()
    assert (outs[0] - wanted).norm() <= 1e-5 * wanted.norm()
    assert all(torch.equal(out, outs[0]) for out in outs)


@KERNELS
def test_a_product_that_benchmark_times(monkeypatch):
    monkeypatch.setattr(benchmark_gpu, "COPIES_BYTES", 0)
    with torch.device(DEVICE):
        product = benchmark_gpu.Product("o", 200, (96,), "int4")
    assert product.bytes == sum(part.nbytes for part in product.weights[-1])
    product.thresholds = product.x.float().abs().sort().values[99:100]
    product.run()
    x = torch.where(product.x.float().abs() <= product.thresholds, 0, product.x).double()
    assert product.kept.item() == x.count_nonzero() * len(product.weights)
    wanted = x @ dequantize(*product.weights[-1]).double() + product.options["residual"]
    assert (product.options["out"] - wanted).norm() <= 1e-2 * wanted.norm()


def test_what_does_not_fit_is_refused():
    good, scales = rounded(torch.randn(96, 8))
    for w_t, scale, ends in ((good, scales, (64,)), (good, scales.float(), (96,)),
                             (good, scales[:, :2], (96,)), (good, scales, (40, 96)),
                             (good[:7], scales, (96,))):
        with pytest.raises(ValueError, match="tensor_gemv"):
            tensor_gemv(torch.randn(8), w_t, torch.zeros(1), torch.empty(96), ends=ends,
                        scale=scale)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the process it starts, or a GPU")
@pytest.mark.skipif(
    [int(part) for part in triton.__version__.split(".")[:2]] < [3, 7]
    and [int(part) for part in numpy.__version__.split(".")[:2]] >= [2, 4],
    reason="this Triton's interpreter fails with this NumPy on loops up to a number from memory")
def test_triton_code_in_the_interpreter():
    """The kernel's own code, on the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
         "-k", "draws or split or times"], cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

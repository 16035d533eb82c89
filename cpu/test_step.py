"""Tests of step.c against the plain forward pass in float32. test_decode.py compares every family;
here are sizes that divide by nothing, dtypes, threads, and numbers that are no numbers."""

import ctypes
import math
import os
import time

import pytest
import torch

from cpu import compiler, matrix, step
from cpu.conftest import fill
from cpu.step import CStep
from model import Config, KVCache, Linear, Model, masked
from quantize import Int8Linear, int4_linear

try:
    compiler.library()
except compiler.NoCompiler as error:
    pytest.skip(str(error), allow_module_level=True)

ODD = Config(101, 50, 33, 2, 6, 2, 10, context=40, qk_norm="head", sliding_window=9)
CONFIGS = {
    "odd": ODD,
    "one of each": Config(3, 2, 1, 1, 1, 1, 2, context=40),
    "wide": Config(130, 70, 4200, 1, 2, 1, 6, context=40, qkv_bias=True, o_bias=True),
    "thirties": Config(130, 96, 4256, 1, 6, 2, 32, context=40, qkv_bias=True),
    "olmo": Config(67, 36, 130, 2, 3, 3, 12, context=40, qk_norm="all", norms_after=True),
}
KINDS = {  # dtype, matrices, dtype of the cache, largest error
    "float32": (torch.float32, Linear, torch.float32, 1e-4),
    "bfloat16": (torch.bfloat16, Linear, torch.float32, 1e-4),
    "float16": (torch.float16, Linear, torch.float32, 1e-4),
    "int8": (torch.bfloat16, Int8Linear, torch.float32, 1e-4),
    "int4": (torch.bfloat16, int4_linear, torch.float32, 1e-4),  # where columns are 32 n
    # sums of another order may round a key to the next number
    "cache in bfloat16": (torch.float32, Linear, torch.bfloat16, 0.05),
    "cache in float16": (torch.float32, Linear, torch.float16, 0.01),
}
CASES = {"odd": [kind for kind in KINDS if kind != "int4"], "one of each": ["float32", "int8"],
         "wide": ["float32", "bfloat16", "float16", "int8"], "thirties": ["bfloat16", "int4"],
         "olmo": ["float32", "cache in bfloat16"]}


class RoundedCache(KVCache):
    """Keeps what a cache of another dtype would, and returns it in float32."""

    def append(self, layer, k, v):
        return tuple(x.float() for x in super().append(layer, k, v))


def in_float32(model):
    """The same model in float32: its weights are those numbers."""
    plain = Model(model.config)
    for ours, theirs in zip(*([m, *m.blocks, *m.linears(), m.lm_head] for m in (plain, model))):
        for name, tensor in vars(theirs).items():
            if name == "w_t":
                theirs.dtype = torch.float32  # that of weight()
                ours.w_t.copy_(theirs.weight(0, theirs.ends[-1]))
            elif isinstance(tensor, torch.Tensor) and name != "scale":
                getattr(ours, name).copy_(tensor)
    return plain


def steps(model, thresholds, n_shares, n=12, cache_dtype=torch.float32):
    """The logits of n steps through the same tokens, and the rows that they read."""
    cache = KVCache(model.config, 40, cache_dtype)
    kept = torch.zeros(thresholds.shape, dtype=torch.int64)
    run = CStep(model, cache, thresholds, kept, n_shares)
    return [run(i % model.config.vocab_size, i).clone() for i in range(n)], kept


def run_for_sanitizers(flag):
    step.library = matrix.library = lambda: compiler.library((flag, "-g", "-O0"))
    few_bits = Config(40, 32, 96, 2, 1, 1, 32, context=40)
    for model in (fill(Model(ODD)), fill(Model(few_bits, linear_class=int4_linear))):
        logits, kept = steps(model, torch.full((2, 7), 0.2), 4, 20)
        print("fine", logits[-1].isfinite().all().item(), kept.sum().item())
    torch.set_num_threads(4)
    for piece in matrix.pieces(model.blocks[1].down):
        print(piece[-1, -1].item())


@pytest.mark.parametrize("name, kind", [(name, kind) for name in CASES for kind in CASES[name]])
def test_dtypes_sizes_and_threads(name, kind):
    """Dense and with thresholds of each projection's own; the shares of a product are 1 x 1, 1 x 5
    and 4 x 2."""
    dtype, linear, cache_dtype, close = KINDS[kind]
    config = CONFIGS[name]
    model = fill(Model(config, dtype, linear_class=linear))
    plain, shape = in_float32(model), (config.n_layers, 7)
    for thresholds in (torch.full(shape, -1.0), torch.rand(shape) * 0.8):
        wanted_kept, cache = torch.zeros(shape, dtype=torch.int64), RoundedCache(
            config, 40, cache_dtype)

        def project(x, linear):
            at = linear.layer, linear.places
            wanted_kept[at] += (~(x.abs() <= thresholds[at][:, None])).sum(1)
            return masked(x, linear, thresholds[at])

        wanted = [plain.logits(plain.forward(torch.tensor([i % config.vocab_size]), cache,
                                             project))[0] for i in range(12)]
        for n_shares in (1, 5, 8):
            logits, kept = steps(model, thresholds, n_shares, cache_dtype=cache_dtype)
            # one x in thousands may be within rounding of its threshold, and more after it
            wrong = (kept - wanted_kept).abs().sum()
            assert wrong <= (12 if thresholds.max() > 0 else 0)
            for found, expected in zip(logits, wanted):
                most = 0.1 if wrong else close
                assert (found - expected).abs().max() <= most * expected.abs().max()


def test_the_same_bits_every_time():
    model, thresholds = fill(Model(ODD)), torch.full((2, 7), 0.3)
    for n_shares in (2, 7):
        first, again = (steps(model, thresholds, n_shares)[0] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    before = len(os.listdir("/proc/self/task"))  # threads
    run = CStep(model, KVCache(ODD, 40), thresholds, torch.zeros(2, 7).long(), 300)
    assert run.m.n_shares == 64 and len(os.listdir("/proc/self/task")) == before + 63
    del run
    assert len(os.listdir("/proc/self/task")) == before


def test_exponentials(tmp_path):
    """Against float64, from one end to the other and beyond."""
    source = tmp_path / "exponential.c"
    source.write_text(f'#include "{compiler.SOURCE}"\n'
                      "void all(float *x, int n) { while (n--) x[n] = exponential(x[n]); }")
    x = torch.cat((torch.linspace(-87, 88, 20_001), torch.tensor([-1e9, 1e9, math.nan])))
    y, expected = x.clone(), x.double().clamp(-87, 88).exp()
    compiler.open_library(source, ("-O1",), tmp_path).all(ctypes.c_void_p(y.data_ptr()), len(y))
    torch.testing.assert_close(y.double(), expected, rtol=2.5e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_no_numbers(dtype):
    """A NaN is kept and reaches the logits; infinities in dropped rows never touch a sum."""
    model, thresholds = fill(Model(ODD, dtype)), torch.full((2, 7), -1.0)
    model.embedding[5, 3] = math.nan
    logits, _ = steps(model, torch.full((2, 7), 1e9), 2, 6)
    assert logits[4].isfinite().all() and logits[5].isnan().all()

    model = fill(Model(ODD, dtype))
    thresholds[0, :3] = 0.5
    x = torch.nn.functional.rms_norm(model.embedding[0].float(), (50,), eps=1e-5)
    x = x * model.blocks[0].attn_norm
    wanted, kept = steps(model, thresholds, 3, 1)
    dropped = x.abs() <= 0.5
    assert kept[0, 0] == (~dropped).sum() < 50
    model.blocks[0].qkv.w_t[dropped] = math.inf
    logits, _ = steps(model, thresholds, 3, 1)
    assert torch.equal(logits[0], wanted[0])
    model.blocks[0].qkv.w_t[(~dropped).nonzero()[0]] = math.inf
    assert not steps(model, thresholds, 3, 1)[0][0].isfinite().all()


def test_every_float16():
    """All of them but NaN, as an embedding, through a block that adds nothing."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = torch.where(halves.isfinite(), halves, 0).view(-1, 64)
    model = fill(Model(Config(1024, 64, 8, 1, 1, 1, 8, context=1024, norm_eps=1.0),
                       torch.float16))
    for linear in model.linears():
        linear.w_t.zero_()
    model.embedding.copy_(halves)
    model.lm_head.w_t.zero_()
    model.lm_head.w_t[:, :64] = torch.eye(64)
    kept = torch.zeros(1, 7, dtype=torch.int64)
    run = CStep(model, KVCache(model.config, 1024, torch.float16), torch.full((1, 7), -1.0), kept,
                1)
    for i, row in enumerate(halves.float()):
        wanted = torch.nn.functional.rms_norm(row, (64,), eps=1.0)
        torch.testing.assert_close(run(i, i)[:64], wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cache_rounds_as_pytorch_does(dtype):
    """Ties to even, overflow to infinity, denormals, NaN: through v, whose matrix is the identity.
    """
    d = 64
    numbers = torch.cat((torch.randn(20) * 1e3, torch.rand(20) * 1e-6, torch.tensor(
        [0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.0, 65520.0,
         1e5, 6e-8, 2.9e-8, 3.1e-8, 6.1e-5, 6.09e-5, 3e38, -1e-7, -2.0, 1e-30, 3e-5, 1e-4, 0.1,
         -65520.0, math.inf])))
    model = fill(Model(Config(4, d, 8, 1, 1, 1, d, context=4)))
    model.blocks[0].qkv.w_t.zero_()
    bias = torch.zeros(3 * d)
    bias[2 * d:] = numbers
    model.blocks[0].qkv.bias = bias
    cache = KVCache(model.config, 4, dtype)
    kept = torch.zeros(1, 7, dtype=torch.int64)
    CStep(model, cache, torch.full((1, 7), -1.0), kept, 2)(1, 0)
    assert torch.equal(cache.v[0, 0, 0], numbers.to(dtype))
    last = torch.tensor(0x7fffffff, dtype=torch.int32).view(torch.float32)  # of all NaN
    model.blocks[0].qkv.bias[2 * d:] = last
    CStep(model, cache, torch.full((1, 7), -1.0), kept, 2)(1, 0)
    assert cache.v[0, 0, 0].isnan().all()


def test_denormals_change_no_speed():
    """Weights so small that every product is denormal. Without a remedy that costs some
    processors a factor of 50."""
    config, seconds = Config(64, 512, 1024, 2, 4, 4, 128, context=40), {}
    for scale in (1.0, 1e-38):
        model = fill(Model(config), scale)
        kept = torch.zeros(2, 7, dtype=torch.int64)
        run = CStep(model, KVCache(config, 40), torch.full((2, 7), -1.0), kept, 1)
        times = []
        for i in range(20):
            start = time.perf_counter()
            run(1, i)
            times.append(time.perf_counter() - start)
        seconds[scale] = min(times)
    assert seconds[1e-38] <= 5 * seconds[1.0], seconds
    assert torch.tensor(1e-310, dtype=torch.float64) * 0.5 > 0  # elsewhere they are numbers

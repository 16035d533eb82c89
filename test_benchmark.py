"""Tests of the benchmark, on tiny random models and the CPU: what it counts, what it refuses."""

import itertools
import json
import shutil
import types
from functools import partial
from unittest import mock

import pytest
import torch

import benchmark
import checkpoint.memory
from calibrate import calibrate
from cli import transformers_speed
from cli.accounting import block_bytes, other_bytes
from decode import CpuDecoder
from model import PROJECTIONS, Config, KVCache, Linear
from quantize import Int4Linear, Int8Linear

TINY = Config(320, 64, 96, 2, 4, 2, 16, context=512, norm_eps=0.1)
TIED = Config(320, 64, 96, 2, 4, 2, 16, context=512, tie_embeddings=True, sliding_window=8,
              rope_theta=100.0)


@pytest.fixture
def benchmarked(run, monkeypatch):
    """Runs benchmark.py on a CPU, with tiny models to name."""
    monkeypatch.setattr(benchmark, "KNOWN_MODELS", {"tiny": TINY, "tied": TIED})
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 1e9)

    return partial(run, benchmark.main, "--device", "cpu")


# ---- models ------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [TINY, TIED], ids=["own head", "tied"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_random_models(config, quantize):
    """transformers gets the same weights."""
    model = benchmark.random_model(config, torch.float32, "cpu", quantize)
    kinds = {None: {Linear}, "int8": {Int8Linear}, "int4": {Int4Linear, Int8Linear}}[quantize]
    assert {type(linear) for linear in [*model.linears(), model.lm_head]} == kinds
    tokens = benchmark.random_tokens(model, 200)
    hidden = model.forward(tokens)
    assert hidden.isfinite().all() and model.logits(hidden).std() > 0.3  # not all tokens alike
    for linear in model.linears():
        weight = linear.weight(0, linear.ends[-1])
        assert abs(weight.std() * linear.in_features ** 0.5 - 1) < 0.05
        assert abs(weight.mean()) < 0.05 * weight.std()
    again = benchmark.random_model(config, torch.float32, "cpu", quantize)
    assert torch.equal(hidden, again.forward(tokens))
    if model.embedding is not None and config.tie_embeddings:  # rounding changed the head alone
        model.embedding = model.lm_head.weight(0, config.vocab_size).T
    for block in model.blocks:
        block.attn_norm.normal_(), block.mlp_norm.normal_()
    theirs = transformers_speed.to_transformers(model)(tokens[None, :7])  # within the window
    torch.testing.assert_close(
        model.logits(model.forward(tokens[:7])), theirs.logits[0], rtol=1e-4, atol=1e-4)


# ---- measuring ---------------------------------------------------------------------------------

def clock(monkeypatch, *seconds, module=benchmark):
    """Let a module's clock show these numbers."""
    times = types.SimpleNamespace(perf_counter=iter(seconds).__next__)
    monkeypatch.setattr(module, "time", times)


def test_the_best_time_gives_the_bandwidth(monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda n, real=torch.ones: real(n >> 20))
    clock(monkeypatch, *itertools.accumulate([0, 4, 0, 2, 0, 3, *[0, 4] * 7]))
    assert benchmark.read_bandwidth(torch.device("cpu")) == 512 / 2


def test_the_speed_of_transformers_leaves_prefill_out(monkeypatch):
    """Medians of three, of which 2 s are the prompt's and 0.5 s each later token's."""
    asked = []

    def generate(prompt, max_new_tokens, **_):
        asked.append((prompt.shape[1], max_new_tokens))
        return prompt

    monkeypatch.setattr(transformers_speed, "to_transformers", lambda model: types.SimpleNamespace(
        generate=generate))
    clock(monkeypatch, *itertools.accumulate(
        seconds for run in (99, 99, 7, 50, 6.5, 2, 1, 9) for seconds in (0, run)),
        module=transformers_speed)
    model = types.SimpleNamespace(device=torch.device("cpu"))
    assert transformers_speed.transformers_speed(model, 30, 11) == 10 / (7 - 2)
    assert asked == [(25, 11)] * 5 + [(25, 1)] * 3


def test_the_first_token_is_timed_without_the_weights(benchmarked, measured, monkeypatch):
    monkeypatch.setattr(benchmark, "process_seconds", iter([1, 5, 9]).__next__)
    code, out, err = benchmarked("--config", "tiny", "--sparsity", "0")
    assert code == 0 and "first token 5.0 s after the process started" in out, err


@pytest.mark.parametrize("config", [TINY, TIED], ids=["own head", "tied"])
def test_bytes_and_sparsity_are_counted(config, monkeypatch):
    model = benchmark.random_model(config, torch.bfloat16, "cpu", None)
    decoder = CpuDecoder(model, KVCache(config, 64, torch.bfloat16), lambda x: x.argmax()[None])
    speeds = partial(benchmark.decode_speeds, prompt=torch.arange(5), context=30, n_tokens=10)
    shape = config.n_layers, len(PROJECTIONS)
    thresholds = [torch.full(shape, t) for t in (-1.0, 0.3, torch.inf)]
    order, set_thresholds = [], decoder.set_thresholds
    decoder.set_thresholds = lambda t: order.append(t[0, 0].item()) or set_thresholds(t)
    dense, some, none = speeds(decoder, thresholds, runs=2)
    assert order == [t[0, 0].item() for t in thresholds] * 3  # in turn, a round to warm up
    assert dense[2] == 0 < some[2] < none[2] == 1 and min(dense[0], some[0], none[0]) > 0
    seen = min(30, config.sliding_window or 30)  # tokens in the cache, on average
    rest = other_bytes(model) + seen * 2 * 2 * 2 * 16 * 2  # and keys and values, in bytes
    assert none[1] == rest and dense[1] == rest + block_bytes(model)
    assert some[1] == pytest.approx(rest + (1 - some[2]) * block_bytes(model))
    assert decoder.n_steps == 3 * 3 * 10 and decoder.position == 25 + 10
    monkeypatch.setattr("lm_head.LEAST_WEIGHTS", 0)  # of the head, only what can matter
    decoder = CpuDecoder(model, decoder.cache, lambda x: x.argmax()[None], top=1)
    once, again = (speeds(decoder, thresholds[:1], runs=1)[0][1] for _ in range(2))
    assert once == again < dense[1]
    # of the times, the median is told; the first run, which warms up, does not count
    clock(monkeypatch, *itertools.accumulate(
        [100, *(seconds for run in (5, 1, 2, 8, 4) for seconds in (0, run))]))
    assert speeds(decoder, thresholds[:1], runs=5)[0][0] == 10 / 4


def test_a_layer_has_two_all_reduces(monkeypatch):
    calls = []
    ranks = types.SimpleNamespace(empty=lambda *_: torch.empty(4), all_reduce=calls.append)
    model = types.SimpleNamespace(ranks=ranks, dtype=None, device=None, config=TINY)
    clock(monkeypatch, 0, 6)
    assert benchmark.reduce_seconds(types.SimpleNamespace(model=model), repeats=3) == 2
    assert len(calls) == 6


# ---- command line ------------------------------------------------------------------------------

@pytest.mark.parametrize("quantize", [[], ["--quantize", "int8"]], ids=["bfloat16", "int8"])
def test_random_weights_on_a_cpu(benchmarked, tmp_path, quantize, monkeypatch):
    file = tmp_path / "new" / "speed.json"
    made, head = [], "whole" if quantize else "auto"
    monkeypatch.setattr(benchmark, "new_decoder", lambda *a, new=benchmark.new_decoder, **options: (
        made.append(options) or new(*a, **options)))
    monkeypatch.setattr(benchmark, "transformers_speed", lambda model, context, n_tokens: context)
    code, out, err = benchmarked("--config", "tiny", "--sparsity", 0, 0.5, "--context", 80, 100,
                                 *quantize, "--head", head, "--json", file,
                                 "--compare", "transformers")
    assert code == 0 and made == [{"top": int(head == "auto")}], err
    assert "uniform from random tokens" in out and "read bandwidth 1 GB/s" in out
    *rows, theirs = json.loads(file.read_text())
    assert [(row["context"], row["sparsity"]) for row in rows] == [
        (80, 0), (80, 0.5), (100, 0), (100, 0.5)]
    for row in rows:
        assert row["config"] == "tiny" and row["gpu"] is None and row["dtype"] == "bfloat16"
        assert row["quantize"] == (quantize[-1] if quantize else None)
        assert abs(row["realised_sparsity"] - row["sparsity"]) < 0.15
        share = row["tokens_per_second"] * row["bytes_per_token"] / row["read_bandwidth"]
        assert row["share_of_limit"] == pytest.approx(share)
    assert theirs["engine"] == "transformers" and theirs["tokens_per_second"] == 80
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.fixture
def measured(monkeypatch):
    """Steps are not timed."""
    monkeypatch.setattr(benchmark, "decode_speeds", lambda _, thresholds, *rest: [
        (10.0, 1e6, 0.5) for _ in thresholds])


def test_a_dense_run_needs_no_calibration(benchmarked, measured, monkeypatch):
    for module, name in ((benchmark.calibrate, "calibrate"), (benchmark, "find")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("calibrates"))
    code, out, err = benchmarked("--config", "tied", "--sparsity", 0)
    assert code == 0 and "no thresholds" in out, err


def test_a_models_own_calibration_is_used(benchmarked, measured, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "m")
    model, _ = checkpoint.load(folder)
    calibrate(model, torch.arange(256).flip(0), 64, source="mine").save(
        folder / "calibration.safetensors")
    code, out, err = benchmarked("--model", folder, "--sparsity", "0.5", "--context", 20)
    assert code == 0 and out.startswith(f"{folder} bfloat16 on CPU"), err
    assert "fisher from mine" in out and "10.0    0.001    1000       1%" in out


def test_too_little_memory(benchmarked, monkeypatch):
    monkeypatch.setattr(checkpoint.memory, "free_memory", lambda device: 1000)
    code, _, err = benchmarked("--config", "tiny")
    assert code == 2 and err.count("\n") == 1
    assert "tiny in bfloat16 needs" in err and "--quantize int8 or a smaller --config" in err


def test_interrupt(benchmarked, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "decode_speeds", mock.Mock(side_effect=KeyboardInterrupt))
    code, _, err = benchmarked("--config", "tiny", "--sparsity", 0, "--json", tmp_path / "a.json")
    assert code == 130 and err == "" and list(tmp_path.iterdir()) == []

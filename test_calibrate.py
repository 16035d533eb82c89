"""Tests of calibrate.py against brute force, on a tiny random model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import calibrate
from calibrate import (BINS, GRID, MOST, SINKS, SITE_OF, STEP, Calibration, CalibrationError, allocate, byte_shares,
                       count, find, fingerprint, masked, parts, quantile)
from model import PROJECTIONS, SITES, Config, Model

CONFIG = Config("llama", vocab_size=64, hidden_size=32, intermediate_size=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8)
DENSE = torch.full((CONFIG.n_layers, len(PROJECTIONS)), -1.0)


def tiny(config=CONFIG, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    model = Model(config, dtype)
    for name, shape in model.shapes.items():
        noise = torch.randn(shape, generator=generator)
        model.put(name, 1 + 0.1 * noise if "norm" in name else noise / shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(CONFIG.vocab_size, (256,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def counts(model, tokens):
    return count(model, tokens.view(4, 64))


def inputs_of(model, tokens):
    """{(layer, site): x [T, K]} of a dense forward pass."""
    seen = {}

    def record(x, p):
        seen[p.layer, p.site] = x
        return calibrate.dense(x, p)

    model.forward(tokens, project=record)
    return seen


# ---------------------------------------------------------------- histograms

@pytest.mark.parametrize("samples", [torch.randn(100_000), torch.randn(100_000) * 1e-4, torch.rand(100_000).pow(8),
                                     torch.distributions.Laplace(0.0, 3.0).sample((100_000,))])
def test_quantiles_of_a_histogram(samples):
    magnitudes = samples.abs()
    counts = torch.bincount(magnitudes.view(torch.int32) >> 16, minlength=BINS)
    thresholds = quantile(counts, GRID)
    exact = torch.quantile(magnitudes, GRID)
    reached = (magnitudes <= thresholds[:, None]).float().mean(-1)
    assert thresholds[0] <= exact[0] and (reached - GRID).abs().max() < 1e-3
    assert ((thresholds - exact).abs() <= 0.008 * exact + 1e-30)[1:].all()  # within one bin


def test_counts_leave_out_the_first_tokens(model, tokens, counts):
    wanted = torch.cat([inputs_of(model, window)[1, "gate_up"][SINKS:] for window in tokens.view(4, 64)]).abs()
    assert counts[1, list(SITES).index("gate_up")].sum() == wanted.numel()
    threshold = quantile(counts[1, 2], torch.tensor([0.5]))
    assert abs((wanted <= threshold).float().mean() - 0.5) < 2e-3


def test_masks_keep_what_is_not_below_the_threshold(model):
    p, x = model.layers[0].qkv, torch.randn(5, CONFIG.hidden_size)
    x[0, 0], x[1, 1] = float("nan"), 0.5
    y = masked(x, p, torch.tensor([0.5, -1.0, 100.0]))
    kept = torch.where(x.abs() <= 0.5, 0, x)
    assert torch.equal(y.isnan(), (torch.arange(5) == 0)[:, None].expand_as(y))
    torch.testing.assert_close(y[1:, :32], kept[1:] @ p.w_t[:, :32])
    torch.testing.assert_close(y[1:, 32:48], x[1:] @ p.w_t[:, 32:48])
    assert not y[1:, 48:].any()


def test_masks_compare_in_float32():
    p = Model(CONFIG, torch.bfloat16).layers[0].down
    p.w_t.fill_(1.0)
    x = torch.zeros(1, CONFIG.intermediate_size, dtype=torch.bfloat16)
    x[0, 0] = 1.0  # in bfloat16 the threshold would become 1
    assert masked(x, p, torch.tensor([0.999])).eq(1).all() and masked(x, p, torch.tensor([1.0])).eq(0).all()


def test_infinite_activations_are_named(tokens):
    model = tiny()
    model.layers[1].gate_up.w_t[3, 5] = float("inf")
    with pytest.raises(CalibrationError, match="layer 1: the input of down"):
        count(model, tokens.view(4, 64))


# ---------------------------------------------------------------- allocations

def test_byte_shares(model):
    q, k, v, o, gate, up, down = (byte_shares(CONFIG) * sum(p.w_t.numel() for layer in model.layers[:1] for p in (
        layer.qkv, layer.o, layer.gate_up, layer.down))).tolist()
    assert (q, k, v, o) == pytest.approx((32 * 32, 32 * 16, 32 * 16, 32 * 32))
    assert (gate, up, down) == pytest.approx((32 * 48,) * 3)


def test_allocate_meets_the_budget_and_beats_every_exchange():
    torch.manual_seed(0)
    levels = torch.arange(100) / 100
    losses = torch.rand(3, 7, 100).cumsum(-1).cumsum(-1) * torch.rand(3, 7, 1)  # convex
    shares = byte_shares(CONFIG)
    sparsities = allocate(losses - losses[..., :1], levels, shares)
    assert (sparsities.diff(dim=-1) >= -1e-6).all() and sparsities.min() >= 0 and sparsities.max() <= 0.99 + 1e-6
    torch.testing.assert_close((sparsities.mean(0).T.double() @ shares).float(), GRID, atol=1e-5, rtol=0)

    # the marginal loss per byte is the same everywhere: no more below s_p than above s_q
    s = (sparsities[..., 50] * 100).double()
    slopes = losses.diff(dim=-1).double() / shares[:, None]
    below = slopes.gather(-1, (s - 1e-3).ceil().long().sub(1).clamp(0, 98)[..., None])[..., 0]
    above = slopes.gather(-1, (s + 1e-3).floor().long().clamp(0, 98)[..., None])[..., 0]
    assert below[s > 0].max() <= above[s < 98.9].min() * (1 + 1e-5)


def test_allocate_walks_hulls_not_curves():
    losses = torch.zeros(1, 7, 3)
    losses[0, :, 1], losses[0, :, 2] = 10.0, 11.0  # the step up to 0.5 looks dear, the whole way is not
    losses[0, 0] = torch.tensor([0.0, 6.0, 12.0])
    sparsities = allocate(losses, torch.tensor([0.0, 0.475, 0.95]), torch.full((7,), 1 / 7, dtype=torch.float64))
    assert sparsities[0, 0, 80] == 0 and sparsities[0, 1:, 80].mean() > 0.93


def test_greedy_is_greedy(model, tokens, counts, monkeypatch):
    monkeypatch.setattr(calibrate, "STEP", 0.05)
    sparsities = calibrate.greedy(model, tokens[:64], counts)
    shares = byte_shares(CONFIG)
    torch.testing.assert_close((sparsities.transpose(1, 2).double() @ shares).float(),
                               GRID.expand(CONFIG.n_layers, -1), atol=1e-5, rtol=0)

    # plain loops over the second block
    rope, x = model.rope(0, 64), model.embed(tokens[:64])
    x = model.block(model.layers[0], x, rope)
    y = model.block(model.layers[1], x, rope)
    levels, path = [0.0] * 7, [[0.0] * 7]
    while sum(s * share for s, share in zip(levels, shares.tolist())) < 0.95:
        best = None
        for i in range(7):
            if levels[i] < MOST:
                trial = list(levels)
                trial[i] = min(MOST, trial[i] + 0.05 / shares[i].item())
                thresholds = torch.stack([quantile(counts[1, SITE_OF[j]], torch.tensor([trial[j]], dtype=torch.float64))[0]
                                          for j in range(7)])
                got = model.block(model.layers[1], x, rope, project=lambda x, p: masked(x, p, parts(thresholds, p)))
                error = (got - y)[SINKS:].square().sum().item()
                if best is None or error < best[0]:
                    best = error, trial
        levels = best[1]
        path.append(levels)
    path = torch.tensor(path, dtype=torch.float64)
    for target in (0.2, 0.5, 0.9):
        reached = path @ shares
        i = int((reached < target).sum())
        wanted = path[i - 1] + (path[i] - path[i - 1]) * (target - reached[i - 1]) / (reached[i] - reached[i - 1])
        torch.testing.assert_close(sparsities[1, :, round(target * 100)], wanted.float(), atol=1e-5, rtol=0)

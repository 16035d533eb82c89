"""Tests of calibrate.py against brute force, on a tiny random model."""

import contextlib
import copy
import dataclasses
import types
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import calibrate
from calibrate import BINS, count, masked_and_counted, quantile, write_text
from calibrations import allocations, own_text
from calibrations.allocations import MOST, allocate, byte_shares
from calibrations.own_text import PROMPTS
from calibrations.thresholds import ALLOCATIONS, GRID, SINKS, Calibration, CalibrationError, find
from conftest import CONFIG, CONFIGS, Letters, random_model, tiny_model
from model import KVCache, Linear, Model, dense, masked
from quantize import Int8Linear
from session import Session


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(CONFIG.vocab_size, (256,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def counts(model, tokens):
    return count(model, tokens.view(4, 64))


# ---- histograms --------------------------------------------------------------------------------

@pytest.mark.parametrize("scale, power", [(1.0, 1), (1e-4, 1), (30.0, 3)])
def test_quantiles_of_a_histogram(scale, power):
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.randn(100_000, generator=generator).abs() ** power * scale
    counts = torch.bincount(magnitudes.view(torch.int32) >> 16, minlength=BINS)
    thresholds = quantile(counts, GRID)
    exact = torch.quantile(magnitudes, GRID)
    reached = (magnitudes <= thresholds[:, None]).float().mean(-1)
    assert thresholds[0] == 0 and (reached - GRID).abs().max() < 1e-3
    assert ((thresholds - exact).abs() <= 0.008 * exact + 1e-30)[1:].all()  # within one bin


def test_counts_leave_out_the_first_tokens(model, tokens, counts):
    seen = []

    def record(x, linear):
        if linear is model.blocks[1].gate_up:
            seen.append(x[SINKS:].abs())
        return dense(x, linear)

    for window in tokens.view(4, 64):
        model.forward(window, project=record)
    wanted = torch.cat(seen)
    for gate_or_up in (4, 5):
        assert counts[1, gate_or_up].sum() == wanted.numel()
        threshold = quantile(counts[1, gate_or_up], torch.tensor([0.5]))
        assert abs((wanted <= threshold).float().mean() - 0.5) < 2e-3


def test_masks_keep_what_is_not_below_the_threshold(model):
    linear, x = model.blocks[0].qkv, torch.randn(5, CONFIG.hidden_size)
    x[0, 0], x[1, 1] = float("nan"), 0.5
    y = masked(x, linear, torch.tensor([0.5, -1.0, 100.0]))
    kept = torch.where(x.abs() <= 0.5, 0, x)
    assert torch.equal(y.isnan(), (torch.arange(5) == 0)[:, None].expand_as(y))
    torch.testing.assert_close(y[1:, :32], kept[1:] @ linear.w_t[:, :32])
    torch.testing.assert_close(y[1:, 32:48], x[1:] @ linear.w_t[:, 32:48])
    assert not y[1:, 48:].any()
    linear = Model(CONFIG, torch.bfloat16).blocks[0].down
    linear.w_t.fill_(1.0)
    x = F.one_hot(torch.tensor([0]), CONFIG.intermediate_size).bfloat16()
    for threshold, y in (0.999, 1), (1.0, 0):  # in bfloat16, 0.999 would become 1
        assert masked(x, linear, torch.tensor([threshold])).eq(y).all()


def test_dropped_shares_are_counted(model, tokens):
    """And the first half of a window is dense."""
    linear, x = model.blocks[1].gate_up, torch.randn(5, CONFIG.hidden_size)
    thresholds, dropped = torch.rand(CONFIG.n_layers, 7), torch.zeros(CONFIG.n_layers, 7).double()
    project = masked_and_counted(thresholds, dropped)
    for _ in range(2):
        assert torch.equal(project(x, linear), masked(x, linear, thresholds[1, 4:6]))
    wanted = torch.zeros_like(dropped)
    for i in (4, 5):
        wanted[1, i] = 2 * (x.abs() <= thresholds[1, i]).double().mean()
    torch.testing.assert_close(dropped, wanted)
    cache = KVCache(CONFIG, 64)
    model.forward(tokens[:32], cache)
    dropped.zero_()
    model.forward(tokens[32:64], cache, project)
    assert torch.equal(calibrate.realised(model, tokens[None, :64], [thresholds])[0], dropped)


def test_infinite_activations_are_named(tokens):
    model = tiny_model()
    model.blocks[1].gate_up.w_t[3, 5] = float("inf")
    with pytest.raises(CalibrationError, match="layer 1: the input of down"):
        count(model, tokens.view(4, 64))


def test_equal_magnitudes_that_no_threshold_splits_are_named(tokens):
    model = tiny_model()
    model.blocks[0].mlp_norm.zero_()  # zeros alone are no obstacle
    count(model, tokens.view(4, 64))
    # All of v is alike, and so is what attention makes of it.
    model.blocks[1].qkv.w_t[:, 48:] = 0.1
    message = "layer 1: 100% of the inputs of o have the same magnitude"
    with pytest.raises(CalibrationError, match=message):
        count(model, tokens[:1].expand(1, 64))


@pytest.mark.parametrize("bin, share, refused", [
    (9, 0.04, False), (9, 0.06, True), (0, 0.9, False)])
def test_how_many_equal_magnitudes_are_too_many(model, tokens, monkeypatch, bin, share, refused):
    counts = torch.full((BINS,), 10)
    counts[bin] = round(share / (1 - share) * 10 * (BINS - 1))
    monkeypatch.setattr(calibrate, "histogram", lambda x, name: counts)
    with pytest.raises(CalibrationError) if refused else contextlib.nullcontext():
        count(model, tokens.view(4, 64))


# ---- allocations -------------------------------------------------------------------------------

def test_byte_shares(model):
    total = sum(linear.w_t.numel() for linear in model.linears()) / CONFIG.n_layers
    q, k, v, o, gate, up, down = (byte_shares(CONFIG) * total).tolist()
    assert (q, k, v, o) == pytest.approx((32 * 32, 32 * 16, 32 * 16, 32 * 32))
    assert (gate, up, down) == pytest.approx((32 * 48,) * 3)


def test_allocate_meets_the_budget_and_beats_every_exchange():
    torch.manual_seed(0)
    levels = torch.arange(100) / 100
    losses = torch.rand(3, 7, 100).cumsum(-1).cumsum(-1) * torch.rand(3, 7, 1)  # convex
    shares = byte_shares(CONFIG)
    sparsities = allocate(losses - losses[..., :1], levels, shares)
    assert (sparsities.diff(dim=-1) >= -1e-6).all()
    assert sparsities.min() >= 0 and sparsities.max() <= 0.99 + 1e-6
    torch.testing.assert_close((sparsities.mean(0).T.double() @ shares).float(), GRID,
                               atol=1e-5, rtol=0)

    # the marginal loss per byte is the same everywhere: no more below s_p than above s_q
    s = (sparsities[..., 50] * 100).double()
    slopes = losses.diff(dim=-1).double() / shares[:, None]
    below = slopes.gather(-1, (s - 1e-3).ceil().long().sub(1).clamp(0, 98)[..., None])[..., 0]
    above = slopes.gather(-1, (s + 1e-3).floor().long().clamp(0, 98)[..., None])[..., 0]
    assert below[s > 0].max() <= above[s < 98.9].min() * (1 + 1e-5)


def test_allocate_walks_hulls_not_curves():
    losses = torch.zeros(1, 7, 3)
    # The step up to 0.5 looks expensive, but the whole way is not.
    losses[0, :, 1], losses[0, :, 2] = 10.0, 11.0
    losses[0, 0] = torch.tensor([0.0, 6.0, 12.0])
    shares = torch.full((7,), 1 / 7, dtype=torch.float64)
    sparsities = allocate(losses, torch.tensor([0.0, 0.475, 0.95]), shares)
    assert sparsities[0, 0, 80] == 0 and sparsities[0, 1:, 80].mean() > 0.93


def test_greedy_is_greedy(model, tokens, counts, monkeypatch):
    monkeypatch.setattr(allocations, "STEP", 0.05)
    monkeypatch.setattr(allocations, "SINKS", 50)  # of 64 tokens
    sparsities = allocations.greedy(model, tokens.view(4, 64), lambda p: quantile(counts, p))
    shares = byte_shares(CONFIG)
    torch.testing.assert_close((sparsities.transpose(1, 2).double() @ shares).float(),
                               GRID.expand(CONFIG.n_layers, -1), atol=1e-5, rtol=0)

    # plain loops over the second block
    rope, x = model.rope(0, 64), model.embed(tokens[:64])
    x = model.blocks[0](x, rope)
    y = model.blocks[1](x, rope)
    levels, path = [0.0] * 7, [[0.0] * 7]
    while sum(s * share for s, share in zip(levels, shares.tolist())) < 0.95:
        best = None
        for i in range(7):
            if levels[i] < MOST:
                trial = list(levels)
                trial[i] = min(MOST, trial[i] + 0.05 / shares[i].item())
                at = torch.tensor(trial, dtype=torch.float64)
                thresholds = torch.cat([quantile(counts[1, j], at[j:j + 1]) for j in range(7)])

                def project(x, linear, thresholds=thresholds):
                    return masked(x, linear, thresholds[linear.places])

                got = model.blocks[1](x, rope, project=project)
                error = (got - y)[50:].square().sum().item()
                if best is None or error < best[0]:
                    best = error, trial
        levels = best[1]
        path.append(levels)
    path = torch.tensor(path, dtype=torch.float64)
    for target in (0.2, 0.5, 0.9):
        reached = path @ shares
        i = int((reached < target).sum())
        weight = (target - reached[i - 1]) / (reached[i] - reached[i - 1])
        wanted = path[i - 1] + (path[i] - path[i - 1]) * weight
        torch.testing.assert_close(sparsities[1, :, round(target * 100)], wanted.float(),
                                   atol=1e-5, rtol=0)


def fisher_costs(model, tokens, counts, monkeypatch):
    """What `fisher` hands to `allocate`, and the labels it drew."""
    labels = []

    def draw(*arguments, real=allocations.draw):
        labels.append(real(*arguments))
        return labels[-1]

    monkeypatch.setattr(allocations, "draw", draw)
    monkeypatch.setattr(allocations, "allocate", lambda costs, levels, shares: costs)
    costs = allocations.fisher(model, tokens.view(4, 64), lambda p: quantile(counts, p))
    return costs, labels


def test_fisher_costs(model, tokens, counts, monkeypatch):
    """They are those by autograd, where each projection has an input of its own."""
    costs, labels = fisher_costs(model, tokens, counts, monkeypatch)
    wanted, leaves = torch.zeros(CONFIG.n_layers, 7, 20), {}

    def project(x, linear):
        y = []
        for i, (start, end) in enumerate(zip(linear.starts, linear.ends), linear.places.start):
            noise = torch.zeros_like(x, requires_grad=True)
            leaves[linear.layer, i] = x.detach(), noise
            y.append((x + noise) @ linear.w_t[:, start:end])
        return torch.cat(y, -1)

    assert len(labels) == 4 * allocations.DRAWS
    for i, drawn in enumerate(labels):
        window = tokens.view(4, 64)[i // allocations.DRAWS]
        logits = model.logits(model.forward(window, project=project))
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        for (layer, i), (x, noise) in leaves.items():
            for level in range(20):
                threshold = quantile(counts[layer, i], torch.tensor([level / 20]))
                effect = (noise.grad * x * (x.abs() <= threshold))[SINKS:].sum(1)
                wanted[layer, i, level] += effect.square().sum()
    torch.testing.assert_close(costs, wanted, atol=1e-4, rtol=2e-3)


def test_fisher_costs_are_twice_the_divergence(model, tokens, counts, monkeypatch):
    """But for k and v, which move other tokens' predictions too."""
    monkeypatch.setattr(allocations, "DRAWS", 60)
    costs, labels = fisher_costs(model, tokens, counts, monkeypatch)
    layer, level = CONFIG.n_layers - 1, 4  # a sparsity of 0.2
    for projection in (0, 3, 4, 5, 6):
        thresholds = torch.full((CONFIG.n_layers, 7), -1.0)
        share = torch.tensor([level / 20])
        thresholds[layer, projection] = quantile(counts[layer, projection], share)

        def sparse(x, linear):
            return masked(x, linear, thresholds[linear.layer, linear.places])

        divergence = 0
        for window in tokens.view(4, 64):
            hidden = [model.forward(window, project=project) for project in (dense, sparse)]
            p, q = (model.logits(x)[SINKS:].log_softmax(-1) for x in hidden)
            divergence += (p.exp() * (p - q)).sum().item()
        cost = costs[layer, projection, level].item() / 60
        assert cost == pytest.approx(2 * divergence, rel=0.1), projection


def test_labels_follow_the_predictions():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0], [3.0, 0.0, 0.0, -torch.inf]])
    drawn = allocations.draw(logits.repeat(20_000, 1), torch.Generator().manual_seed(0)).view(-1, 2)
    for row, ids in zip(logits, drawn.T):
        shares = torch.bincount(ids, minlength=4) / len(ids)
        torch.testing.assert_close(shares, row.softmax(-1), atol=0.01, rtol=0)


def test_how_much_is_looked_at(model, tokens, monkeypatch):
    """Four windows to see what the targets reach; two draws of labels; text at temperature 1."""
    monkeypatch.setattr(calibrate, "realised", mock.Mock(side_effect=calibrate.realised))
    calibrate.calibrate(model, tokens.repeat(2), 64, "uniform")
    _, windows, tables, _ = calibrate.realised.call_args.args
    assert windows.shape == (4, 64) and len(tables) == 5 and allocations.DRAWS == 2
    monkeypatch.setattr(own_text, "Session", mock.Mock(side_effect=Session))
    calibrate.write_text(model, Letters(), 3, seed=5)
    options = own_text.Session.call_args.kwargs
    assert options["temperature"] == 1 and options["seed"] == 5 and "top_k" not in options


# ---- making a calibration ----------------------------------------------------------------------

def test_targets_are_reached_with_all_masks_at_work(model, tokens):
    windows, shares = tokens.view(4, 64)[:2], byte_shares(CONFIG)
    for allocation in ("uniform", "fisher"):
        calibration = calibrate.calibrate(model, windows.flatten(), 64, allocation)
        for sparsity in (0.2, 0.5, 0.6, 0.9):
            reached, = calibrate.realised(model, windows, [calibration.thresholds(sparsity)])
            assert (reached.mean(0) @ shares).item() == pytest.approx(sparsity, abs=0.01)
            expected = calibration.expected(sparsity).mean(0).double() @ shares
            assert expected.item() == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize("name, linear, allocation", [
    *((name, Linear, "fisher") for name in CONFIGS), ("llama", Int8Linear, "fisher"),
    ("mistral", Linear, "greedy"), ("olmo3", Linear, "greedy"), ("qwen2", Linear, "uniform")])
def test_every_family_reaches_its_target(name, linear, allocation, monkeypatch):
    """Calibrated by random tokens, decoding leaves unread the share asked for.

    The text is drawn at temperature 1: it is as random as that of the calibration. At 0, such a
    model may repeat one token, whose activations are like nobody else's.
    """
    monkeypatch.setattr(allocations, "STEP", 0.05)
    torch.manual_seed(0)
    model, tokens = random_model(CONFIGS[name], linear, "cpu"), torch.randint(0, 101, (640,))
    model.digest = "0" * 16
    thresholds = calibrate.calibrate(model, tokens, 128, allocation).thresholds(0.5)
    session = Session(model, thresholds, temperature=1.0, context=150)
    assert len(list(session.generate(tokens[:64].tolist(), 60))) == 60
    assert session.sparsity() == pytest.approx(0.5, abs=0.04)


def test_targets_are_read_where_they_are_reached_first():
    """Also where a higher target drops less: at .6 and .8 here."""
    calibration = Calibration(GRID.expand(2, 7, -1), GRID.expand(2, 7, -1), {})
    shares = torch.full((2, 7), 1 / 14, dtype=torch.float64)
    corrected = calibrate.correct(calibration, shares, lambda tables: [
        torch.full((2, 7), reached, dtype=torch.float64)
        for reached in (0.2, 0.4, 0.35, 0.3, 0.95)])
    assert (corrected.table.diff(dim=-1) >= 0).all()
    for target in (0.1, 0.33, 0.37, 0.39):
        torch.testing.assert_close(corrected.thresholds(target), torch.full((2, 7), target))


# ---- the command line --------------------------------------------------------------------------

@pytest.fixture
def calibrated(run, model, cache, tmp_path, monkeypatch):
    """Runs calibrate.py on the tiny model."""
    monkeypatch.setattr("cli.command_line.load", lambda *args, **options: (model, Letters()))
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 12)

    return partial(run, calibrate.main, "--device", "cpu", "--window", 64)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_calibrating_on_a_text(calibrated, tmp_path, allocation, monkeypatch):
    monkeypatch.setattr(allocations, "STEP", 0.1)
    file = tmp_path / "c"
    code, out, err = calibrated("--text", tmp_path / "text", "--tokens", 200,
                         "--allocation", allocation, "--out", file)
    assert code == 0 and out.strip() == str(file), err
    metadata = Calibration.load(file, CONFIG).metadata
    assert metadata["allocation"] == allocation
    assert (metadata["tokens"], metadata["window"]) == ("192", "64")


def test_calibrating_on_what_the_model_writes(calibrated, model, monkeypatch):
    monkeypatch.setattr(Letters, "bos_id", 7)
    for name in ("calibrate", "count"):
        monkeypatch.setattr(calibrate, name, mock.Mock(side_effect=getattr(calibrate, name)))
    assert calibrated("--tokens", 128, "--seed", 3, "--allocation", "uniform")[0] == 0
    assert find(model).metadata["source"] == "self-written, seed 3"
    _, tokens, *_, bos_id = calibrate.calibrate.call_args.args
    assert torch.equal(tokens, write_text(model, Letters(), 128, 3)) and bos_id == 7
    windows = calibrate.count.call_args.args[1]  # each begins as a text does
    assert (windows[:, 0] == 7).all()
    assert torch.equal(windows[:, 1:], tokens.view(windows.shape)[:, 1:])
    assert not torch.equal(tokens, write_text(model, Letters(), 128, 4)) and len(tokens) == 128


def test_a_written_text(model):
    """It begins with the first token, even if its id is 0; a text ends at a stop token or after
    512."""
    tokenizer = Letters()
    tokenizer.bos_id, tokenizer.eos_ids = 0, frozenset(range(1, 64, 2))
    text = write_text(model, tokenizer, 100)
    assert not (text % 2).any() and text[0] == 0 and (text == 0).sum() > 5  # half of them end it
    tokenizer.eos_ids = frozenset()
    text = write_text(model, tokenizer, 2 * 512 + 1)
    assert text[::512].tolist() == [0, 0, 0] and (text == 0).sum() < 100
    tokenizer.bos_id, tokenizer.eos_ids = None, frozenset({5})
    assert write_text(model, tokenizer, 10)[0] == 5


def test_a_chat_model_answers_all_prompts_in_turn(model):
    tokenizer, asked = Letters(), []
    tokenizer.has_chat_template, tokenizer.eos_ids = True, frozenset(range(1, 64, 2))
    tokenizer.chat = lambda messages: asked.extend(messages) or [2 * len(asked), 0]
    text = write_text(model, tokenizer, 200).tolist()
    assert [m["content"] for m in asked] == list(PROMPTS) and len(asked) == 10
    assert {*range(2, 21, 2)} <= {id for id, end in zip(text, text[1:]) if end == 0}
    tokenizer.chat = lambda messages: [2] * 600  # longer than a text
    assert len(write_text(model, tokenizer, 700)) == 700


def test_the_brief_calibration(model, monkeypatch):
    """2,048 tokens of the shipped text in windows of 1,024, or shorter if model or text are,
    whatever context the run asked for."""
    monkeypatch.setattr(calibrate, "calibrate", lambda model, tokens, window, source, bos_id: (
        tokens, window, source, bos_id, model.config.context))
    for context, held, window in (2048, 9999, 1024), (1024, 9999, 1024), (64, 9999, 64), (
            2048, 300, 150):
        tokenizer = types.SimpleNamespace(bos_id=3,
                                          encode=lambda text, held=held: [ord(text[0])] * held)
        other = copy.copy(model)
        other.own_config = dataclasses.replace(CONFIG, context=context)
        for asked in (context, 8, 4096):
            other.set_context(dataclasses.replace(CONFIG, context=asked))
            tokens, *rest = calibrate.calibrate_briefly(other, tokenizer)
            assert len(tokens) == min(held, 2048)
            assert rest == [window, "calibrations/text.txt", 3, context]
            assert other.config.context == asked


def test_what_the_python_api_refuses(model):
    for options, words in (
            ({"window": 8}, "8 tokens is outside 9 to 2048"),
            ({"window": 2049}, "2049 tokens is outside 9 to 2048"),
            ({"window": 64, "allocation": "best"}, "'best'; expected one of fisher")):
        with pytest.raises(CalibrationError, match=words):
            calibrate.calibrate(model, torch.zeros(9999, dtype=torch.int64), **options)

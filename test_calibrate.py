"""Tests of calibrate.py against brute force, on a tiny random model."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import calibrate
import calibration as calibration_file
import checkpoint
import teal
from calibrate import BINS, MOST, SINKS, SITE_OF, allocate, byte_shares, count, masked, parts, quantile
from calibration import ALLOCATIONS, GRID, Calibration, CalibrationError, cache_path, find
from model import SITES, Config, Model

CONFIG = Config("llama", vocab_size=64, hidden_size=32, intermediate_size=48, n_layers=2, n_heads=4, n_kv_heads=2,
                head_dim=8)


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

@pytest.mark.parametrize("scale, power", [(1.0, 1), (1e-4, 1), (30.0, 3)])
def test_quantiles_of_a_histogram(scale, power):
    magnitudes = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs() ** power * scale
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


def test_equal_magnitudes_that_no_threshold_splits_are_named(tokens):
    model = tiny()
    model.layers[0].mlp_norm.zero_()  # zeros alone are no obstacle
    count(model, tokens.view(4, 64))
    model.layers[1].qkv.w_t[:, 48:] = 0.1  # all of v is alike, and so is what attention makes of it
    with pytest.raises(CalibrationError, match="layer 1: 100% of the inputs of o have the same magnitude"):
        count(model, tokens[:1].expand(1, 64))


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
                at = torch.tensor(trial, dtype=torch.float64)
                thresholds = torch.cat([quantile(counts[1, SITE_OF[j]], at[j:j + 1]) for j in range(7)])
                got = model.block(model.layers[1], x, rope, project=lambda x, p: masked(x, p, thresholds[parts(p)]))
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


def leaf_gradients(model, tokens, labels):
    """{(layer, projection index): (x, dL/dx)} by autograd, every projection given an input of its own."""
    leaves = {}

    def project(x, p):
        y, start = [], 0
        for i, end in enumerate(p.ends, calibrate.FIRST[p.site]):
            noise = torch.zeros_like(x, requires_grad=True)
            leaves[p.layer, i] = x.detach(), noise
            y.append((x + noise) @ p.w_t[:, start:end])
            start = end
        return torch.cat(y, -1)

    logits = model.logits(model.forward(tokens, project=project))
    F.cross_entropy(logits, labels, reduction="sum").backward()
    return {key: (x, noise.grad) for key, (x, noise) in leaves.items()}


def test_gradients_of_each_projection(model, tokens):
    seen = {}

    def record(x, p, gradients):
        for i, g in enumerate(gradients, calibrate.FIRST[p.site]):
            seen[p.layer, i] = x, g

    logits = model.logits(calibrate.hidden_states(model, tokens[:64], lambda x, p: calibrate.Probe.apply(x, p, record)))
    F.cross_entropy(logits, tokens[1:65], reduction="sum").backward()
    wanted = leaf_gradients(model, tokens[:64], tokens[1:65])
    assert seen.keys() == wanted.keys() and len(wanted) == 14
    for key in wanted:
        torch.testing.assert_close(seen[key][0], wanted[key][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen[key][1], wanted[key][1], atol=1e-5, rtol=1e-4)


def fisher_costs(model, tokens, counts, monkeypatch):
    """What `fisher` hands to `allocate`, and the labels it drew."""
    labels = []

    def draw(*arguments, real=calibrate.draw):
        labels.append(real(*arguments))
        return labels[-1]

    monkeypatch.setattr(calibrate, "draw", draw)
    monkeypatch.setattr(calibrate, "allocate", lambda costs, levels, shares: costs)
    return calibrate.fisher(model, tokens.view(4, 64), counts), labels


def test_fisher_costs(model, tokens, counts, monkeypatch):
    costs, labels = fisher_costs(model, tokens, counts, monkeypatch)
    wanted = torch.zeros(CONFIG.n_layers, 7, 20)
    assert len(labels) == 4 * calibrate.DRAWS
    for i, drawn in enumerate(labels):
        window = tokens.view(4, 64)[i // calibrate.DRAWS]
        for (layer, i), (x, g) in leaf_gradients(model, window, drawn).items():
            for level in range(20):
                threshold = quantile(counts[layer, SITE_OF[i]], torch.tensor([level / 20]))
                wanted[layer, i, level] += (g * x * (x.abs() <= threshold))[SINKS:].sum(1).square().sum()
    torch.testing.assert_close(costs, wanted, atol=1e-4, rtol=2e-3)


@pytest.mark.parametrize("projection", [0, 3, 4, 5, 6])  # behind k and v other tokens' predictions move too
def test_fisher_costs_are_twice_the_divergence(model, tokens, counts, monkeypatch, projection):
    monkeypatch.setattr(calibrate, "DRAWS", 60)
    costs, labels = fisher_costs(model, tokens, counts, monkeypatch)
    layer, level = CONFIG.n_layers - 1, 4  # a sparsity of 0.2
    thresholds = torch.full((CONFIG.n_layers, 7), -1.0)
    thresholds[layer, projection] = quantile(counts[layer, SITE_OF[projection]], torch.tensor([level / 20]))

    divergence = 0
    for window in tokens.view(4, 64):
        p, q = (model.logits(model.forward(window, project=project))[SINKS:].log_softmax(-1) for project in (
            calibrate.dense, lambda x, p: masked(x, p, thresholds[p.layer, parts(p)])))
        divergence += (p.exp() * (p - q)).sum().item()
    assert costs[layer, projection, level].item() / 60 == pytest.approx(2 * divergence, rel=0.1)


def test_labels_follow_the_predictions():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0], [3.0, 0.0, 0.0, -torch.inf]])
    drawn = calibrate.draw(logits.repeat(20_000, 1), torch.Generator().manual_seed(0)).view(-1, 2)
    for row, ids in zip(logits, drawn.T):
        shares = torch.bincount(ids, minlength=4) / len(ids)
        torch.testing.assert_close(shares, row.softmax(-1), atol=0.01, rtol=0)


# ---------------------------------------------------------------- the file

@pytest.fixture(scope="module")
def calibration(model, tokens):
    return calibrate.calibrate(model, tokens, 64, "fisher", source="noise")


def test_thresholds_of_a_calibration(calibration):
    assert (calibration.thresholds(0) == -1).all() and (calibration.thresholds(0.0) == -1).all()
    torch.testing.assert_close(calibration.thresholds(0.5), calibration.table[..., 50])
    torch.testing.assert_close(calibration.thresholds(0.955 - 0.01), (calibration.table[..., 94:].sum(-1) / 2))
    torch.testing.assert_close(calibration.thresholds(0.95), calibration.table[..., 95])
    shares = byte_shares(CONFIG).float()
    for sparsity in (0.1, 0.345, 0.95):
        assert (calibration.expected(sparsity).mean(0) @ shares).item() == pytest.approx(sparsity, abs=1e-4)
    for sparsity in (-0.01, 0.951, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="from 0 to 0.95"):
            calibration.thresholds(sparsity)


def test_a_file_gives_back_what_was_saved(calibration, tmp_path):
    calibration.save(tmp_path / "new" / "c.safetensors")
    loaded = Calibration.load(tmp_path / "new" / "c.safetensors", CONFIG)
    assert torch.equal(loaded.table, calibration.table) and torch.equal(loaded.sparsities, calibration.sparsities)
    assert loaded.metadata == calibration.metadata and loaded.metadata["allocation"] == "fisher"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.safetensors"]


def test_saving_at_once_on_a_full_disk_or_killed(calibration, tmp_path, monkeypatch):
    """The file is there whole or not at all."""
    file = tmp_path / "c.safetensors"

    def full(*_):
        raise SafetensorError("No space left on device")
    with monkeypatch.context() as patch, pytest.raises(CalibrationError, match="cannot write .*No space left"):
        patch.setattr(calibration_file, "save_file", full)
        calibration.save(file)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(calibration_file.os, "replace", lambda *_: os._exit(9))
        if (child := os.fork()) == 0:
            calibration.save(file)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not file.exists()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(calibration.save, [file] * 32))
    assert torch.equal(Calibration.load(file, CONFIG).table, calibration.table)
    assert len(list(tmp_path.iterdir())) == 2  # and what the killed process left


def test_targets_are_reached_with_all_masks_at_work(model, tokens):
    windows, shares = tokens.view(4, 64)[:2], byte_shares(CONFIG)
    for allocation in ("uniform", "fisher"):
        calibration = calibrate.calibrate(model, windows.flatten(), 64, allocation)
        for sparsity in (0.2, 0.5, 0.6, 0.9):
            reached = calibrate.realised(model, windows, calibration.thresholds(sparsity)).mean(0)
            assert (reached @ shares).item() == pytest.approx(sparsity, abs=0.01)
            expected = calibration.expected(sparsity).mean(0).double() @ shares
            assert expected.item() == pytest.approx(sparsity, abs=1e-3)


def damaged(calibration, **changes):
    """The calibration's tensors and metadata with some of them replaced; None removes."""
    tensors = {"sparsity_grid": GRID, "thresholds": calibration.table, "sparsities": calibration.sparsities}
    metadata = dict(calibration.metadata)
    for name, value in changes.items():
        kind = metadata if name in metadata else tensors
        kind.pop(name) if value is None else kind.update({name: value})
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, metadata


def test_hostile_files_are_refused(calibration, tmp_path):
    nan, falling = calibration.table.clone(), calibration.table.clone()
    nan[1, 2, 3], falling[0, 0, 50] = float("nan"), 1e9
    file = tmp_path / "c.safetensors"
    for changes, sentence in (
            ({"thresholds": nan}, "must be finite"), ({"thresholds": falling}, "must be finite"),
            ({"thresholds": -calibration.table - 1}, "must be finite"), ({"thresholds": None}, "thresholds"),
            ({"thresholds": calibration.table[:1]}, "expected F32"),
            ({"thresholds": calibration.table.double()}, "expected F32"),
            ({"sparsities": calibration.sparsities * 2}, "must lie in"), ({"sparsity_grid": GRID / 2}, "must lie in"),
            ({"format": "2"}, "format"), ({"format": None}, "format"), ({"fingerprint": "{}"}, "another model")):
        save_file(*[damaged(calibration, **changes)[0], file, damaged(calibration, **changes)[1]])
        with pytest.raises(CalibrationError, match=sentence) as raised:
            Calibration.load(file, CONFIG)
        assert "\n" not in str(raised.value)
    calibration.save(file)
    for content in (b"", b"hello", file.read_bytes()[:-8], b"\xff" * 8 + file.read_bytes()[8:]):
        file.write_bytes(content)
        with pytest.raises(CalibrationError, match="cannot read"):
            Calibration.load(file, CONFIG)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CalibrationError, match="cannot read"):
            Calibration.load(path, CONFIG)


def test_find_prefers_the_models_own(model, calibration, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find(model) is None
    calibration.metadata["source"] = "cache"
    calibration.save(cache_path(model))
    assert find(model).metadata["source"] == "cache" and find(model, folder=tmp_path).metadata["source"] == "cache"
    assert find(tiny(seed=1)) is None  # a fine-tune of the same shape
    calibration.metadata["source"] = "beside"
    calibration.save(tmp_path / "calibration.safetensors")
    assert find(model, folder=tmp_path).metadata["source"] == "beside"
    with pytest.raises(CalibrationError, match="cannot read"):
        find(model, path=tmp_path / "nowhere")


def test_every_calibration_of_the_repository_loads():
    files = sorted((Path(calibrate.__file__).parent / "calibrations").glob("*.safetensors"))
    assert files
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        numbers = json.loads(metadata["fingerprint"])
        config = Config("llama", **numbers)
        calibration = Calibration.load(file, config)
        assert metadata["allocation"] in ALLOCATIONS and metadata["source"]
        for sparsity in (0.2, 0.5, 0.9):
            reached = calibration.expected(sparsity).mean(0).double() @ byte_shares(config)
            assert reached.item() == pytest.approx(sparsity, abs=0.001)


# ---------------------------------------------------------------- the tables published with TEAL

def test_teal_tables(tmp_path):
    """Thresholds read from quantiles are those our code finds in a histogram with the same quantiles."""
    file = tmp_path / "Llama-2-7B.npz"
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4, 50_000, generator=generator).abs() * torch.tensor([[1.0], [0.1], [0.5], [0.02]])
    quantiles = torch.quantile(samples, GRID, dim=1).T  # [4, 96]
    targets = np.arange(1, 19) / 20
    greedy = np.broadcast_to(targets[:, None], (32, 18, 7)).copy()
    greedy[:, :, 1] = 9.0  # as published for k of Llama-3-70B
    np.savez(file, sparsity_grid=GRID, magnitude_quantiles=quantiles.expand(32, -1, -1), target_grid=targets,
             greedy_sparsity=greedy.astype(np.float32))
    counts = torch.stack([torch.bincount(row.view(torch.int32) >> 16, minlength=BINS) for row in samples])
    for allocation in ("uniform", "greedy"):
        calibration = teal.convert(file, allocation)
        ours = quantile(counts[SITE_OF], calibration.sparsities[5])
        reached = [(samples[SITE_OF][:, None] <= thresholds[:, ::19, None]).float().mean(-1)  # [7, 6]
                   for thresholds in (ours, calibration.table[5])]
        assert (reached[0] - reached[1]).abs().max() < 1e-3
    assert calibration.sparsities.max() <= 0.95 and "FasterDecoding" in calibration.metadata["licence"]
    with pytest.raises(CalibrationError, match="Llama-2-13B"):
        teal.convert(tmp_path / "GPT-2.npz", "uniform")

    script = [sys.executable, teal.__file__, "--allocation", "greedy", "--out", tmp_path / "c"]
    assert subprocess.run([*script, file]).returncode == 0
    assert torch.equal(Calibration.load(tmp_path / "c", teal.config_of("Llama-2-7B")).table, calibration.table)
    done = subprocess.run([*script, "GPT-2.npz"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no model TEAL published" in done.stderr


# ---------------------------------------------------------------- the command line

class Letters:
    """A tokenizer of single letters."""

    eos_ids, bos_id, has_chat_template = frozenset({0}), None, False

    def encode(self, text, bos=True):
        return [ord(letter) % CONFIG.vocab_size for letter in text]


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs the script in this process -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(checkpoint, "load", lambda *args, **options: (model, Letters()))
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 12)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["calibrate.py", "--device", "cpu", "--window", "64", *map(str, arguments)])
        try:
            calibrate.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_calibrating_on_a_text(run, tmp_path, allocation, monkeypatch):
    monkeypatch.setattr(calibrate, "STEP", 0.1)
    file = tmp_path / "c"
    code, out, err = run("--text", tmp_path / "text", "--tokens", 200, "--allocation", allocation, "--out", file)
    assert code == 0 and out.strip() == str(file), err
    metadata = Calibration.load(file, CONFIG).metadata
    assert (metadata["allocation"], metadata["tokens"], metadata["window"]) == (allocation, "192", "64")


def test_calibrating_on_what_the_model_writes(run, model):
    assert run("--tokens", 128, "--seed", 3, "--allocation", "uniform")[0] == 0
    assert find(model).metadata["source"] == "self-written, seed 3"
    texts = [calibrate.write_text(model, Letters(), 100, seed) for seed in (3, 3, 4)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2]) and len(texts[0]) == 100


@pytest.mark.parametrize("arguments, sentence", [
    (["--text", "nowhere.txt"], "nowhere.txt"),
    (["--text", __file__, "--window", 1 << 20], "is outside 9 to 2048"),
    (["--text", __file__, "--window", 8], "is outside 9 to 2048"),
    (["--text", __file__, "--tokens", 63], "63 tokens do not fill one window of 64"),
    (["--device", "cuda:77"], "device 'cuda:77' is not available"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(run, arguments, sentence):
    code, out, err = run(*arguments)
    assert code == 2 and sentence in err and err.count("\n") == 1 and not out

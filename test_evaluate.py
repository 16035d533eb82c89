"""Tests of evaluate.py against direct computation, on a tiny random model."""

import itertools
import json
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import calibrate
import evaluate
from calibrations.allocations import byte_shares
from calibrations.thresholds import Calibration
from conftest import CONFIG, Letters, tiny_model
from evaluate import cut, score
from model import PROJECTIONS, KVCache, masked

DENSE = torch.full((CONFIG.n_layers, len(PROJECTIONS)), -1.0)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(CONFIG.vocab_size, (6, 64), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def calibration(model, windows):
    return calibrate.calibrate(model, windows[:4].flatten(), 64, "uniform")


def test_dense_perplexity_is_that_of_one_plain_forward_pass(model, windows):
    losses = []
    for tokens in windows:
        logits = model.logits(model.forward(tokens))
        losses.append(F.cross_entropy(logits[32:-1], tokens[33:]).item())
    wanted = math.exp(sum(losses) / len(losses))
    for result in evaluate.evaluate(model, windows, [None, DENSE]):
        assert result["perplexity"] == pytest.approx(wanted, rel=1e-5)
        assert result["kl"] == pytest.approx(0, abs=1e-6) and result["top1"] == 1
        assert not result["sparsity"].any()


def test_sparse_scores_are_those_of_decoding_token_by_token(model, windows, calibration):
    tokens, thresholds = windows[5], calibration.thresholds(0.4)

    def project(x, linear):
        return masked(x, linear, thresholds[linear.layer, linear.places])

    cache = KVCache(model.config, 64)
    model.forward(tokens[:32], cache)
    logits = torch.cat([model.logits(model.forward(token[None], cache, project))
                        for token in tokens[32:-1]])
    reference = model.logits(model.forward(tokens))[32:-1].log_softmax(-1)
    result, = score(model, tokens, [thresholds])
    assert result["nll"] == pytest.approx(F.cross_entropy(logits, tokens[33:]).item(), rel=1e-4)
    divergence = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1).mean()
    assert result["kl"] == pytest.approx(divergence.item(), rel=1e-3)
    assert abs(result["sparsity"].mean() - 0.4) < 0.05  # of the second half alone
    same = reference.argmax(-1) == logits.argmax(-1)
    assert result["top1"] == pytest.approx(same.float().mean().item())


def test_realised_sparsity_is_what_was_asked_for(model, windows, calibration):
    tables = [calibration.thresholds(sparsity) for sparsity in (0.25, 0.5)]
    for sparsity, result in zip((0.25, 0.5), evaluate.evaluate(model, windows, tables)):
        assert (result["sparsity"].mean() - sparsity).abs() < 0.02
    everything, = evaluate.evaluate(model, windows[:1], [torch.full_like(DENSE, 1e9)])
    assert everything["sparsity"].eq(1).all()


def test_cut():
    tokens = torch.arange(40)
    assert cut(tokens, 8, 1, 2).tolist() == [list(range(8, 16)), list(range(16, 24))]
    assert len(cut(tokens, 8)) == 5 and len(cut(tokens, 7, 3)) == 2
    for arguments in (41,), (8, 4, 2), (8, 5):
        with pytest.raises(ValueError, match="windows"):
            cut(tokens, *arguments)


def test_the_best_calibration_of_each_allocation(model, calibration, monkeypatch):
    found = [Calibration(calibration.table, calibration.sparsities, {"allocation": name})
             for name in ("fisher", "uniform", "fisher")]
    monkeypatch.setattr(evaluate, "candidates", lambda model: found)
    assert evaluate.find_calibrations(model, [], None) == {"fisher": found[0], "uniform": found[1]}
    assert evaluate.find_calibrations(model, [], ["uniform"]) == {"uniform": found[1]}


# ---- the command line --------------------------------------------------------------------------

@pytest.fixture
def evaluated(run, model, calibration, cache, tmp_path, monkeypatch):
    """Runs evaluate.py on the tiny model."""
    monkeypatch.setattr("cli.command_line.load", lambda *args, **options: (model, Letters()))
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    calibration.save(tmp_path / "uniform.safetensors")

    def evaluated(*words, calibration=("--calibration", tmp_path / "uniform.safetensors")):
        return run(evaluate.main, "--text", tmp_path / "text", "--window", 64, "--device", "cpu",
                   *calibration, *words)

    return evaluated


def test_results_table_and_plot(evaluated, tmp_path):
    code, out, err = evaluated("--sparsity", 0, 0.25, 0.5, "--json", tmp_path / "r.json",
                         "--plot", tmp_path / "p.png")
    assert code == 0, err
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(row["allocation"], row["sparsity"]) for row in rows] == [
        ("dense", 0), ("uniform", 0.25), ("uniform", 0.5)]
    for row in rows:
        assert row.keys() > {*evaluate.IDENTITY}
        assert row["model"] == "SmolLM2-135M-Instruct.Q4_1.gguf" and row["text"] == "text"
        assert (row["dtype"], row["quantize"]) == ("float32", None)
        assert (row["window"], row["offset"]) == (64, 0)
        assert row["windows"] == 8 and f"{row['perplexity']:.2f}" in out
        shares = dict(zip(PROJECTIONS, byte_shares(CONFIG).tolist()))
        assert row["realised_sparsity"] == pytest.approx(
            sum(shares[name] * share for name, share in row["projections"].items()))
    assert rows[0]["kl"] == 0 and rows[0]["top1"] == 1 and rows[0]["realised_sparsity"] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_again_is_replaced(evaluated, tmp_path, calibration):
    """It is known by its content, not by names: another text, number of windows or calibration of
    the same name is another measurement; a model or a text under two names is one."""
    file, other = tmp_path / "r.json", tmp_path / "other"
    other.mkdir()
    (other / "text").write_text("Another text of that name. " * 20)
    (other / "same").write_text("\ufeff" + (tmp_path / "text").read_text())
    changed = Calibration(calibration.table * 1.1, calibration.sparsities, calibration.metadata)
    changed.save(other / "uniform.safetensors")

    def rows(*arguments):
        code, _, err = evaluated("--json", file, *arguments)
        assert code == 0, err
        return json.loads(file.read_text())

    first = rows("--sparsity", 0, 0.5, "--model", "m3")
    second = rows("--sparsity", 0.25)
    assert second[:2] == first and len(second) == 3
    file.write_text(json.dumps([first[0], first[1] | {"perplexity": -1.0}, second[2]]))
    third = rows("--sparsity", 0.5, "--model", "./m3/", "--text", other / "same")
    assert third[:2] == [first[0], second[2]] and len(third) == 3
    assert third[2] == first[1] | {"model": "./m3/", "text": "same"}
    for more in (["--windows", 1], ["--window", 128], ["--text", other / "text"],
                 ["--calibration", other / "uniform.safetensors"]):
        before, third = third, rows("--sparsity", 0.5, *more)
        assert third[:-1] == before
    old = [{name: value for name, value in row.items() if name not in ("tokens", "thresholds")}
           for row in first]  # as older versions wrote them: of who knows which text
    file.write_text(json.dumps(old))
    assert rows("--sparsity", 0, 0.5, "--model", "m3")[:2] == old


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"sparsity": 0}]'])
def test_files_of_others_are_left_alone(evaluated, tmp_path, monkeypatch, content):
    """They are refused before the measurement."""
    monkeypatch.setattr(evaluate, "score", None)
    (tmp_path / "r.json").write_text(content)
    code, out, err = evaluated("--json", tmp_path / "r.json")
    assert code == 2 and "holds no results" in err and err.count("\n") == 1 and not out
    assert (tmp_path / "r.json").read_text() == content


def test_an_interrupted_measurement_leaves_no_file(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "score", mock.Mock(side_effect=KeyboardInterrupt))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = evaluated("--json", tmp_path / "new" / "r.json", "--plot", tmp_path / "p.png")
    assert code == 130 and not out and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_models_that_share_their_last_norm(evaluated, tmp_path, monkeypatch):
    """Each gets its own perplexity, and neither replaces the other's row. A token that begins texts
    takes the place of every window's first. A dense measurement needs no calibration."""
    monkeypatch.setattr(evaluate, "find_calibrations", None)
    one, other = tiny_model(), tiny_model(seed=1)
    other.norm.copy_(one.norm)
    rows, perplexities, tokenizer = [], [], Letters()
    for tokenizer.bos_id, model in itertools.product((None, 7), (one, other)):
        monkeypatch.setattr("cli.command_line.load",
                            lambda *_, model=model, **__: (model, tokenizer))
        code, _, err = evaluated("--sparsity", 0, "--json", tmp_path / "r.json", calibration=())
        assert code == 0, err
        before, rows = rows, json.loads((tmp_path / "r.json").read_text())
        assert rows[:-1] == before
        windows = cut(torch.tensor(tokenizer.encode((tmp_path / "text").read_text())), 64)
        if tokenizer.bos_id:
            windows[:, 0] = tokenizer.bos_id
        result, = evaluate.evaluate(model, windows, [None])
        perplexities.append(result["perplexity"])
    assert [row["perplexity"] for row in rows] == pytest.approx(perplexities)
    assert abs(perplexities[0] - perplexities[1]) > 0.1
    assert rows[0]["weights"] != rows[1]["weights"]

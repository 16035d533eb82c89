"""Tests of evaluate.py against direct computation, on a tiny random model."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import calibrate
import checkpoint
import evaluate
from evaluate import cut, score
from model import PROJECTIONS, KVCache
from test_calibrate import CONFIG, tiny

DENSE = torch.full((CONFIG.n_layers, len(PROJECTIONS)), -1.0)


@pytest.fixture(scope="module")
def model():
    return tiny()


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
    for thresholds in (None, DENSE):
        result = evaluate.evaluate(model, windows, thresholds)
        assert result["perplexity"] == pytest.approx(wanted, rel=1e-5)
        assert result["kl"] == pytest.approx(0, abs=1e-6) and result["top1"] == 1 and not result["sparsity"].any()


@pytest.mark.parametrize("all_sparse", [False, True])
def test_sparse_scores_are_those_of_decoding_token_by_token(model, windows, calibration, all_sparse):
    tokens, thresholds = windows[5], calibration.thresholds(0.4)

    def project(x, p):
        return calibrate.masked(x, p, thresholds[p.layer, calibrate.parts(p)])

    cache = KVCache(model.config, 64)
    model.forward(tokens[:32], cache, *[project] * all_sparse)
    logits = torch.cat([model.logits(model.forward(token[None], cache, project)) for token in tokens[32:-1]])
    reference = model.logits(model.forward(tokens))[32:-1].log_softmax(-1)
    result, = score(model, tokens, [thresholds], all_sparse)
    assert result["nll"] == pytest.approx(F.cross_entropy(logits, tokens[33:]).item(), rel=1e-4)
    divergence = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1).mean()
    assert result["kl"] == pytest.approx(divergence.item(), rel=1e-3)
    assert result["top1"] == pytest.approx((reference.argmax(-1) == logits.argmax(-1)).float().mean().item())


def test_realised_sparsity_is_what_was_asked_for(model, windows, calibration):
    for sparsity in (0.25, 0.5):
        result = evaluate.evaluate(model, windows, calibration.thresholds(sparsity))
        assert (result["sparsity"].mean() - sparsity).abs() < 0.02
    everything = evaluate.evaluate(model, windows[:1], torch.full_like(DENSE, 1e9))
    assert everything["sparsity"].eq(1).all()


def test_cut():
    tokens = torch.arange(40)
    assert cut(tokens, 8, 1, 2).tolist() == [list(range(8, 16)), list(range(16, 24))]
    assert len(cut(tokens, 8)) == 5 and len(cut(tokens, 7, 3)) == 2
    for arguments in ((41,), (8, 4, 2), (8, 5), (8, -1, 2), (8, 0, 0)):
        with pytest.raises(ValueError, match="windows"):
            cut(tokens, *arguments)


# ---------------------------------------------------------------- the command line

class Letters:
    """A tokenizer of single letters."""

    eos_ids, bos_id, has_chat_template = frozenset({0}), None, False

    def encode(self, text, bos=True):
        return [ord(letter) % CONFIG.vocab_size for letter in text]


@pytest.fixture
def run(model, calibration, tmp_path, monkeypatch, capsys):
    """Runs the script in this process -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "load", lambda *args, **options: (model, Letters()))
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 12)  # 540 tokens
    calibration.save(tmp_path / "uniform.safetensors")

    def run(*arguments):
        defaults = ["--text", str(tmp_path / "text"), "--window", "64", "--device", "cpu",
                    "--calibration", str(tmp_path / "uniform.safetensors")]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *defaults, *map(str, arguments)])
        try:
            evaluate.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def test_results_table_and_plot(run, tmp_path):
    code, out, err = run("--sparsity", 0, 0.25, 0.5, "--json", tmp_path / "r.json", "--plot", tmp_path / "p.png")
    assert code == 0, err
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(row["allocation"], row["sparsity"]) for row in rows] == [("dense", 0), ("uniform", 0.25), ("uniform", 0.5)]
    for row in rows:
        assert {"allocation", "sparsity", "realised_sparsity", "perplexity", "kl", "top1"} <= row.keys()
        assert row["windows"] == 8 and f"{row['perplexity']:.2f}" in out
    assert rows[0]["kl"] == 0 and rows[0]["top1"] == 1 and rows[0]["realised_sparsity"] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_continues(run, tmp_path, monkeypatch):
    file, arguments = tmp_path / "r.json", ("--sparsity", 0, 0.5, "--json", tmp_path / "r.json")
    assert run(*arguments)[0] == 0
    whole = json.loads(file.read_text())
    file.unlink()

    calls = []

    def scored(*arguments, real=score):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(evaluate, "score", scored)
    code, out, err = run(*arguments)
    assert code == 130 and "the same command continues" in err
    assert [row["windows"] for row in json.loads(file.read_text())] == [3, 3]
    assert run(*arguments)[0] == 0
    assert len(calls) == 4 + 5
    for row, wanted in zip(json.loads(file.read_text()), whole):
        for key, value in wanted.items():
            assert row[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)

    assert run(*arguments)[0] == 0 and len(calls) == 9  # nothing is left to do
    assert run(*arguments, "--offset", 1)[0] == 0 and len(calls) == 9 + 7  # another run: from the start


@pytest.mark.parametrize("arguments, sentence", [
    (["--window", 1000], "windows of 1000 tokens"),
    (["--offset", 7, "--windows", 2], "the text holds 8 windows of 64 tokens"),
    (["--sparsity", 0.97], "sparsity 0.97"),
    (["--sparsity", "nan"], "sparsity nan"),
    (["--window", 4096], "--window 4096"),
    (["--text", "nowhere.txt"], "nowhere.txt"),
    (["--calibration", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--allocation", "fisher"], "no fisher calibration"),
    (["--json", __file__], "holds no results"),
    (["--device", "cuda:77"], "device 'cuda:77' is not available"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(run, arguments, sentence):
    code, out, err = run(*arguments)
    assert code == 2 and sentence in err.splitlines()[-1] and "Traceback" not in err and not out

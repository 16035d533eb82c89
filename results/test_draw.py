"""Tests of results/draw.py: it draws what benchmark.py writes."""

import json

import pytest

from results import draw


def row(quantize, sparsity, context=200):
    """A row of benchmark.py --json, its numbers made up."""
    size = 1e10 * (1 - sparsity) * (0.5 if quantize else 1)
    return {"config": "tiny", "gpu": "none", "dtype": "bfloat16", "quantize": quantize,
            "sparsity": sparsity, "realised_sparsity": sparsity, "context": context,
            "tokens_per_second": 2e12 / size, "bytes_per_token": size, "read_bandwidth": 4e12,
            "share_of_limit": 0.5}


ENGINE = {"config": "tiny", "engine": "other", "gpu": "none", "dtype": "bfloat16", "context": 200,
          "tokens_per_second": 9}


def test_speed(run, tmp_path, monkeypatch):
    """Speeds as measured, twice as high the limit; another engine; nothing of other contexts."""
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps(
        [row(None, 0.5), row(None, 0), row(None, 0.25, context=4000), ENGINE]))
    files[1].write_text(json.dumps([row("int8", 0), row("int8", 0.5)]))
    figures = []

    def subplots(*args, real=draw.plt.subplots, **options):
        figures.append(real(*args, **options))
        return figures[-1]

    monkeypatch.setattr(draw.plt, "subplots", subplots)
    code, _, err = run(draw.main, "speed", tmp_path / "speed.png", *files)
    assert code == 0, err
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    (axis,), = figures[0][1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines.pop("other, bfloat16") == [[0, 9], [1, 9]]
    assert lines == {
        "bfloat16": [[0, 200], [0.5, 400]], "bfloat16, the limit": [[0, 400], [0.5, 800]],
        "int8": [[0, 400], [0.5, 800]], "int8, the limit": [[0, 800], [0.5, 1600]]}


@pytest.mark.parametrize("text, words", [
    ("{", "holds no results"), ("[1]", "holds no results"),
    (json.dumps([row(None, 0, context=100)]), "no speeds at context 200")])
def test_no_speed(run, tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    code, out, err = run(draw.main, "speed", tmp_path / "speed.png", tmp_path / "a.json")
    assert code == 2 and words in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "speed.png").exists()


@pytest.mark.parametrize("words", [["--help"], ["idea", "--help"], ["speed", "--help"]])
def test_help_draws_nothing(run, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert run(draw.main, *words).code == 0 and not list(tmp_path.iterdir())

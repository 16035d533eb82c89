"""Tests of thresholds.py: the calibration's file and its look-up, and the files shipped."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import calibrate
from calibrate import BINS, quantile
from calibrations import convert
from calibrations.allocations import byte_shares
from calibrations.thresholds import (
    ALLOCATIONS,
    GRID,
    Calibration,
    CalibrationError,
    cache_path,
    candidates,
    find,
)
from checkpoint.files import one_line, write_whole
from conftest import CONFIG, tiny_model
from cpu.compiler import cache_folder
from model import SITES, Config


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def calibration(model):
    tokens = torch.randint(CONFIG.vocab_size, (256,), generator=torch.Generator().manual_seed(1))
    return calibrate.calibrate(model, tokens, 64, "fisher", source="noise")


def test_thresholds_of_a_calibration(calibration):
    assert (calibration.thresholds(0) == -1).all() and (calibration.thresholds(0.0) == -1).all()
    torch.testing.assert_close(calibration.thresholds(0.5), calibration.table[..., 50])
    between = calibration.table[..., 94:].mean(-1)
    torch.testing.assert_close(calibration.thresholds(0.945), between)
    torch.testing.assert_close(calibration.thresholds(0.95), calibration.table[..., 95])
    shares = byte_shares(CONFIG).float()
    for sparsity in (0.1, 0.345, 0.95):
        reached = (calibration.expected(sparsity).mean(0) @ shares).item()
        assert reached == pytest.approx(sparsity, abs=1e-4)
    for sparsity in (-0.01, 0.951, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="from 0 to 0.95"):
            calibration.thresholds(sparsity)


def test_a_file_gives_back_what_was_saved(calibration, tmp_path):
    """It has the usual permissions, and what becomes of it later changes nothing."""
    file, umask = tmp_path / "new" / "c.safetensors", os.umask(0o022)
    try:
        calibration.save(file)
    finally:
        os.umask(umask)
    loaded = Calibration.load(file, CONFIG)
    assert file.stat().st_mode & 0o777 == 0o644 and list(file.parent.iterdir()) == [file]
    with open(file, "r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(loaded.table, calibration.table)
    assert torch.equal(loaded.sparsities, calibration.sparsities)
    assert loaded.metadata == calibration.metadata and loaded.metadata["allocation"] == "fisher"


def test_saving_at_once_on_a_full_disk_or_killed(calibration, tmp_path, monkeypatch):
    """The file is there whole or not at all."""
    file, opened = tmp_path / "c[1].safetensors", len(os.listdir("/proc/self/fd"))

    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CalibrationError, match="cannot write .*No space left"):
            calibration.save(file)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("checkpoint.files.os.replace", lambda *_: os._exit(9))
        if (child := os.fork()) == 0:
            calibration.save(file)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not file.exists()
    left, = tmp_path.iterdir()
    os.utime(left, (0, 0))  # long ago
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(calibration.save, [file] * 32))
    assert torch.equal(Calibration.load(file, CONFIG).table, calibration.table)
    assert list(tmp_path.iterdir()) == [file]  # what the killed process left is gone
    with write_whole(file) as temporary:
        temporary.write_text("of a living process")
        calibration.save(file)
        assert temporary.exists()
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "of a living process"
    assert len(os.listdir("/proc/self/fd")) == opened


def test_the_cache_is_where_the_system_wants_it(monkeypatch):
    for value, folder in ("/a", "/a"), ("", "~/.cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path(folder).expanduser() / "nanoteal"
    assert one_line(ValueError("x\ny")) == "x" and len(one_line(ValueError("x" * 999))) == 300
    assert one_line(ValueError("a\x1b[1m")) == "a\ufffd[1m"


def test_hostile_files_are_refused(calibration, tmp_path):
    nan, falling = calibration.table.clone(), calibration.table.clone()
    nan[1, 2, 3], falling[0, 0, 50] = float("nan"), 1e9
    file = tmp_path / "c.safetensors"
    tensors = {"sparsity_grid": GRID, "thresholds": calibration.table,
               "sparsities": calibration.sparsities}
    for changes, sentence in (
            ({"thresholds": nan}, "must be finite"),
            ({"thresholds": falling}, "must be finite"),
            ({"thresholds": calibration.table - 1}, "must be finite"),
            ({"thresholds": calibration.table[:1]}, "expected F32"),
            ({"thresholds": calibration.table.double()}, "expected F32"),
            ({"sparsities": calibration.sparsities * 2}, "must lie in"),
            ({"sparsities": calibration.sparsities - 0.01}, "must lie in"),
            ({"sparsity_grid": GRID / 2}, "must lie in"),
            ({"format": "2"}, "is not a calibration of format 1"),
            ({"fingerprint": "{}"}, "another model"), ({"allocation": "best"}, "names 'best' as")):
        metadata = calibration.metadata | {k: v for k, v in changes.items() if k not in tensors}
        changed = tensors | {k: v for k, v in changes.items() if k in tensors}
        save_file({name: t.clone().contiguous() for name, t in changed.items()}, file, metadata)
        with pytest.raises(CalibrationError, match=sentence) as raised:
            Calibration.load(file, CONFIG)
        assert "\n" not in str(raised.value)
    save_file({"thresholds": calibration.table}, file, calibration.metadata)
    with pytest.raises(CalibrationError, match="cannot read .*sparsity_grid"):
        Calibration.load(file, CONFIG)
    calibration.save(file)
    for content in (b"", b"hello", file.read_bytes()[:-8], b"\xff" * 8 + file.read_bytes()[8:]):
        file.write_bytes(content)
        with pytest.raises(CalibrationError, match="cannot read .*; make the file anew"):
            Calibration.load(file, CONFIG)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CalibrationError, match="cannot read"):
            Calibration.load(path, CONFIG)


def test_find_prefers_the_models_own(model, calibration, cache, tmp_path, monkeypatch):
    def sources(model):
        return [found.metadata["source"] for found in candidates(model)]

    assert find(model) is None
    calibration.metadata["source"] = "cache"
    calibration.save(cache_path(model))
    tune = tiny_model(seed=1)  # a fine-tune of the same shape
    assert find(model).metadata["source"] == "cache" and find(tune) is None
    monkeypatch.setattr(model, "folder", tmp_path, raising=False)
    beside = Calibration(calibration.table, calibration.sparsities,
                         calibration.metadata | {"source": "beside"})
    beside.save(tmp_path / "calibration.safetensors")
    assert sources(model) == ["beside", "cache"] and find(model).is_own(model)
    tune.folder = tmp_path
    assert sources(tune) == ["beside"] and not find(tune).is_own(tune)
    beside.metadata["weights"] = "0" * 16  # of others: the model's own one in the cache is better
    beside.save(tmp_path / "calibration.safetensors")
    assert sources(model) == ["cache", "beside"]
    with pytest.raises(CalibrationError, match="cannot read"):
        find(model, path=tmp_path / "nowhere")


def test_every_calibration_of_the_repository_loads():
    files = sorted(Path(convert.__file__).parent.glob("*.safetensors"))
    assert files
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        numbers = json.loads(metadata["fingerprint"])
        config = Config(**numbers)
        calibration = Calibration.load(file, config)
        assert metadata["allocation"] in ALLOCATIONS and metadata["source"]
        for sparsity in (0.2, 0.5, 0.9):
            reached = calibration.expected(sparsity).mean(0).double() @ byte_shares(config)
            assert reached.item() == pytest.approx(sparsity, abs=0.001)


def test_the_shipped_calibrations_are_those_of_the_default_models_weights(smollm):
    """The default allocation comes first."""
    found = [*candidates(smollm[0])][-2:]
    assert [one.metadata["allocation"] for one in found] == ["fisher", "uniform"]
    assert ALLOCATIONS[0] == "fisher"
    assert all(one.path.parent.name == "calibrations" for one in found)
    assert all(one.is_own(smollm[0]) for one in found)


# ---- the tables published with TEAL ------------------------------------------------------------

def test_teal_tables(tmp_path):
    """Thresholds read from quantiles are those that our code finds in a histogram."""
    file = tmp_path / "Llama-2-7B.npz"
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[1.0], [0.1], [0.5], [0.02]])
    samples = torch.randn(4, 50_000, generator=generator).abs() * scales
    quantiles = torch.quantile(samples, GRID, dim=1).T  # [4, 96]
    targets = np.arange(1, 19) / 20
    greedy = np.broadcast_to(targets[:, None], (32, 18, 7)).copy()
    greedy[:, :, 1] = 9.0  # as published for k of Llama-3-70B
    np.savez(file, sparsity_grid=GRID, magnitude_quantiles=quantiles.expand(32, -1, -1),
             target_grid=targets, greedy_sparsity=greedy.astype(np.float32))
    samples = samples[[i for i, names in enumerate(SITES.values()) for _ in names]]  # [7, 50000]
    counts = torch.stack([torch.bincount(row.view(torch.int32) >> 16, minlength=BINS)
                          for row in samples])
    for allocation in ("uniform", "greedy"):
        calibration = convert.convert(file, allocation)
        ours = quantile(counts, calibration.sparsities[5])
        reached = [(samples[:, None] <= thresholds[:, ::19, None]).float().mean(-1)  # [7, 6]
                   for thresholds in (ours, calibration.table[5])]
        assert (reached[0] - reached[1]).abs().max() < 1e-3
    assert calibration.sparsities.max() <= 0.95
    assert "FasterDecoding" in calibration.metadata["licence"]


def test_the_shipped_calibrations_are_those_of_the_shipped_tables(tmp_path):
    paths = list(convert.convert_all(tmp_path))
    assert len({path.name for path in paths}) == 12
    for path in paths:
        there = convert.FOLDER / path.name
        with safe_open(path, "pt") as made, safe_open(there, "pt") as shipped:
            assert made.metadata() == shipped.metadata() and {*made.keys()} == {*shipped.keys()}
            for name in made.keys():
                assert torch.equal(made.get_tensor(name), shipped.get_tensor(name)), path.name

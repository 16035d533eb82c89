"""Hugging Face folders: what transformers saved loads; what is damaged is refused."""

import fnmatch
import json
import shutil

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError, open_checkpoint
from checkpoint.conftest import CONFIG, refused, same, weights, write_folder
from checkpoint.folder_tokenizer import NAMES


def test_hub_cache_offline(tmp_path, monkeypatch):
    """A hub repository in the local cache, blobs behind symlinks, needs no network."""
    import huggingface_hub.constants
    repo, sha = tmp_path / "hub" / "models--someone--tiny", "a" * 40
    snapshot = repo / "snapshots" / sha
    for folder in snapshot, repo / "refs":
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(sha)
    for file in write_folder(repo / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(open_checkpoint("someone/tiny"), weights())
    refused("someone/other", "cannot download someone/other")


def test_what_is_downloaded_from_the_hub(tmp_path, monkeypatch):
    """All that `open_folder` reads, and no code, no pickles, no second copy of the weights."""
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns, **_: (
        asked.append((repo, allow_patterns)) or write_folder(tmp_path / "m")))
    assert open_checkpoint("some/one").folder == tmp_path / "m"
    (repo, patterns), = asked
    read = ("config.json", "tokenizer.json", "adapter_config.json", "model.safetensors",
            "model-00001-of-00002.safetensors", "model.safetensors.index.json", *NAMES)
    names = (*read, "pytorch_model.bin", "modeling.py", "consolidated.safetensors", "a/params.json")
    found = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
    assert repo == "some/one" and found == [*read]


def test_harmless_extra_tensors(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    extra = {"lm_head.weight": weights(config)["model.embed_tokens.weight"],
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    folder = write_folder(tmp_path / "m", config, weights(config) | extra)
    assert same(open_checkpoint(folder), weights(config))
    with pytest.raises(CheckpointError, match="context 65 is outside 1 to 64"):
        checkpoint.load(folder, context=65)
    extra["lm_head.weight"] = torch.zeros(320, 32)
    refused(write_folder(folder, config, weights(config) | extra),
            "lm_head.weight is not the embedding")


@pytest.mark.parametrize("text, words", [
    ("{", "not JSON"), ("[]", "expected an object"), ("[" * 100_000, "not JSON"),
    ("\xff", "not JSON"),
    (json.dumps(CONFIG | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}),
     "MambaForCausalLM"),
    (json.dumps(CONFIG | {"hidden_size": 10**9}), "hidden_size"),
    (json.dumps(CONFIG | {"num_hidden_layers": 1000}), "missing"),
    (json.dumps(CONFIG | {"vocab_size": 4_000_000, "hidden_size": 1 << 20}), "has shape"),
    (" " * (25 << 20), "at most")])
def test_bad_config(tmp_path, text, words):
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, "config.json" if words not in ("missing", "has shape") else str(folder),
            words)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.norm.weight"), ("model.norm.weight", "missing")),
    (lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
     ("model.norm.weight", "[31]", "[32]")),
    (lambda t: t.update({"model.layers.0.mlp.experts.weight": torch.zeros(3)}),
     ("unexpected", "experts")),
    (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
     ("model.norm.weight", "I8"))])
def test_bad_tensors(tmp_path, change, words):
    tensors = weights()
    change(tensors)
    refused(write_folder(tmp_path / "m", tensors=tensors), *words)


def test_bad_safetensors(tmp_path):
    """The last is sound but for its header's length, of which spaces are most."""
    file = write_folder(tmp_path / "m") / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * (4 << 20)
    for damaged, words in (
            (data[:-100], ""), (b"", ""), (b"\x80\x04}.", ""),
            (data.replace(b'"shape":[32]', b'"shape":[31]', 1), ""),
            (len(header).to_bytes(8, "little") + header + data[end:], "header claims")):
        file.write_bytes(damaged)
        refused(tmp_path / "m", "model.safetensors", words)


@pytest.mark.parametrize("index, words", [
    *(({"weight_map": {"a": name}}, "same folder")
      for name in ("../model.safetensors", "/etc/passwd", "pytorch_model.bin", 3)),
    ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "missing"),
    ({"weight_map": []}, "weight_map"),
    ({}, "weight_map"),
    ({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}, "another shard")])
def test_bad_index(tmp_path, index, words):
    folder = write_folder(tmp_path / "m")
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, words)

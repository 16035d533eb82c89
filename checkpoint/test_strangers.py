"""Files that leave something out, say it wrongly, or are something else than they look."""

import functools
import json

import gguf
import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint import CheckpointError, open_checkpoint
from checkpoint.conftest import (
    ALPHABET,
    CONFIG,
    PIECES,
    convert_to_gguf,
    pair,
    refused,
    same,
    weights,
    write_bpe,
    write_folder,
    write_gguf,
)
from checkpoint.gguf_container import read_parts


@pytest.mark.parametrize("arch, names, pre", [
    ("llama", ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"],
     "llama-bpe"), ("qwen2", ["<|endoftext|>", "<|im_end|>"], "qwen2"), ("llama", ["<x>"], None),
    ("llama", ["<|endoftext|>", "<repo_name>"], "smollm"),
    ("llama", ["[AVAILABLE_TOOLS]", "<s>"], "tekken")])
@pytest.mark.parametrize("said", [None, "default"])
def test_a_vocabulary_that_says_not_how_it_cuts(tmp_path, capsys, arch, names, pre, said):
    file, tokens = write_bpe(tmp_path / "m.gguf", names, arch=arch, pre=said)
    ours = open_checkpoint(file).tokenizer
    assert ("text may be cut wrongly" in capsys.readouterr().err) == (pre is None)
    said = open_checkpoint(write_bpe(tmp_path / "n.gguf", names, arch=arch,
                                     pre=pre or "default")[0]).tokenizer
    text = "It'S 12345 don't  aBc"
    assert ours.encode(text) == said.encode(text) and ours.bos_id == said.bos_id
    first = {"llama-bpe": "<|begin_of_text|>", "tekken": "<s>"}.get(pre)  # the file names none
    assert ours.bos_id == (tokens.index(first) if first else None)


@pytest.mark.parametrize("kind", ["normal", "user-defined", "untyped"])
def test_tokens_known_by_their_names(tmp_path, kind):
    """What ends a turn or looks like control is that, whatever its type; what merges make is
    text."""
    names = ["<|end|>", "<｜User｜>", "[INST]", "<eos>", "plain"]
    changes = {"chat_template": "[INST]{{ messages }}", "pre": "qwen2"}
    merges = ("< /", "</ s", "</s >")  # a word of code
    count = len(ALPHABET) + len(merges)
    if kind != "normal":
        changes["token_type"] = None if kind == "untyped" else [1] * count + [4] * 5
    file, tokens = write_bpe(tmp_path / "m.gguf", (), names, merges, **changes)
    t = open_checkpoint(file).tokenizer
    ids = {name: tokens.index(name) for name in names}
    assert t.eos_ids == {ids["<|end|>"], ids["<eos>"]}
    control = [ids[name] for name in names[:4]]
    assert t.encode("".join(names[:4])) == control and t.decode(control) == ""
    assert not {*t.encode("".join(names[:4]), special=False)} & {*control}
    assert t.decode(t.encode("</s>plain")) == "</s>plain"
    assert (ids["plain"] in t.encode("plain")) == (kind == "user-defined")


def test_sentencepiece_without_ids_and_types(tmp_path):
    """llama.cpp's own defaults: 0 is unknown, 1 begins and 2 ends a text."""
    full = open_checkpoint(write_gguf(tmp_path / "m.gguf")).tokenizer
    bare = open_checkpoint(write_gguf(tmp_path / "n.gguf", **{
        f"tokenizer.ggml.{key}": None for key in (
            "bos_token_id", "eos_token_id", "unknown_token_id", "token_type")})).tokenizer
    assert (bare.bos_id, bare.eos_ids) == (1, {2})
    for text in "the and é日", "<s></s> the <0x41>", "  x\n":
        assert bare.encode(text) == full.encode(text)
        assert bare.encode(text, special=False) == full.encode(text, special=False)


@pytest.mark.parametrize("change, strips", [
    ({"general.name": "Phi-3 mini"}, True), ({"general.name": "my PHI3"}, True), ({}, False)])
def test_white_space_behind_the_tokens_of_phi3(tmp_path, change, strips):
    names = ["<|user|>", "<|end|>", "<|endoftext|>"]
    tokens = [*PIECES[:-3], *names]
    change = change | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type":
                       [2, 3, 3] + [6] * 256 + [1] * (320 - 262) + [3] * 3}
    t = open_checkpoint(write_gguf(tmp_path / "m.gguf", **change)).tokenizer
    tight = t.encode("<|user|>the<|end|>and<|endoftext|>\n")
    assert tight[-1] == PIECES.index("<0x0A>")
    assert (t.encode("<|user|> \n the<|end|>\nand<|endoftext|>\n") == tight) == strips


def test_empty_and_equal_tokens(tmp_path):
    names = ["ab", "", "ab", "<|im_end|>", "<|im_end|>", ""]
    file, tokens = write_bpe(tmp_path / "m.gguf", (), names, ("a b",), pre="qwen2")
    t, n = open_checkpoint(file).tokenizer, len(ALPHABET)
    assert t.encode("ab") == [n] and t.decode([n, n + 1, n + 2, n + 3, n + 6]) == "ababab"
    assert t.eos_ids == {n + 4, n + 5}
    stream = checkpoint.tokenizer.TextStream(t)
    assert [stream.push(n + i) for i in range(7)] == ["ab", "ab", "", "ab", "", "", ""]


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}


@pytest.mark.parametrize("given, meant", [
    ({"rope.scale_linear": 4.0}, LINEAR), ({"rope.scaling.factor": 4.0}, LINEAR),
    ({"rope.scaling.factor": 0.0}, {}),
    ({"rope.scaling.type": "none", "rope.scale_linear": 2.0}, {}),
    ({"final_logit_softcapping": 30.0}, None), ({"attention.scale": 0.2}, None),
    ({"attention.causal": False}, None), ({"expert_count": 8}, None),
    ({"attention.value_length": 4}, None)])
def test_keys_of_gguf(tmp_path, given, meant):
    """Older and missing ones are read as meant; those that would change the model are refused."""
    def config(changes):
        file = write_gguf(tmp_path / "m.gguf", **{f"llama.{key}": value
                                                  for key, value in changes.items()})
        return open_checkpoint(file).config

    base = {"attention.key_length": 8} if "attention.value_length" in given else {}
    if meant is None:
        with pytest.raises(CheckpointError, match="m.gguf cannot be read"):
            config(base | given)
    else:
        assert config(given) == config(meant)


# ---- split files -------------------------------------------------------------------------------

def test_split_gguf(tmp_path, monkeypatch):
    """Any part stands for all; an error names the part that is missing or bad."""
    splitting = functools.partial(gguf.GGUFWriter, split_max_tensors=5)
    monkeypatch.setattr(gguf, "GGUFWriter", splitting)
    write_gguf(tmp_path / "m.gguf")
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 5
    for part in parts[0], parts[3]:
        opened = open_checkpoint(part)
        assert same(opened, weights()) and opened.files == parts
    start = parts[2].read_bytes()
    parts[2].write_bytes(start[:-40])
    refused(parts[0], parts[2].name, "does not fit")
    parts[2].write_bytes(parts[1].read_bytes())
    refused(parts[0], parts[2].name, "it is not part 3 of 5")
    parts[2].unlink()
    refused(parts[0], "part 1 of 5 of a split GGUF, and m-00003-of-00005.gguf is missing")
    odd = parts[1]
    for name in "m-00009-of-00005.gguf", "x.gguf":
        refused(odd := odd.rename(tmp_path / name), "one of 5 parts", "need their names")


def test_the_file_with_a_bad_weight_is_named(tmp_path):
    tensors, bad = weights(), "model.layers.1.mlp.up_proj.weight"
    tensors[bad][0, 0] = float("nan")
    places = dict.fromkeys(tensors, "a.safetensors") | {bad: "b.safetensors"}
    folder = write_folder(tmp_path / "m", tensors={bad: tensors.pop(bad)},
                          **{"model.safetensors.index": {"weight_map": places}})
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    save_file(tensors, folder / "a.safetensors")
    refused(folder, "b.safetensors cannot be read", bad)
    theirs, _ = pair("phi-3")
    theirs.model.layers[0].mlp.gate_up_proj.weight.data[-1, 0] = float("inf")
    refused(convert_to_gguf(theirs, tmp_path / "p.gguf", "phi3", False), "p.gguf", "up_proj")


# ---- files that are something else than they look ----------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
ADAPTER = json.dumps({"base_model_name_or_path": "org/base"}).encode()


@pytest.mark.parametrize("files, words", [
    *(({name: LFS}, f"{name} is a Git LFS pointer")
      for name in ("model.safetensors", "tokenizer.json", "config.json")),
    ({"config.json": b"<!DOCTYPE html><html>"}, "config.json is a web page"),
    ({"model.safetensors": b"GGUF" + bytes(40)}, "it is a GGUF file"),
    ({"config.json": None, "x-Q4.GGUF": b""}, "config.json is missing; the folder holds x-Q4.GGUF"),
    ({"config.json": None, "consolidated.safetensors": b""}, "makers' own program"),
    ({"config.json": None, "model_index.json": b"{}"}, "a pipeline that makes images"),
    ({"config.json": None, "snapshots": b""}, "the hub's cache; give the folder in snapshots"),
    ({"config.json": None}, "config.json is missing; a Hugging Face folder has one"),
    ({"model.safetensors": None, "tf_model.h5": b""}, "holds tf_model.h5, which is not read"),
    ({"model.safetensors": None, "pytorch_model.bin.index.json": b""}, "json is a pickle"),
    ({"chat_template.jinja": "é".encode("utf-16")}, "chat_template.jinja cannot be read: 'utf-8'"),
    ({"config.json": None, "adapter_config.json": ADAPTER}, "a LoRA adapter of org/base; merge"),
    ({"model.safetensors": None, "adapter_config.json": ADAPTER}, "a LoRA adapter of org/base"),
    ({"model.safetensors": None, "pytorch_model.BIN": b""}, "pytorch_model.BIN is a pickle"),
    ({"model.safetensors": None, "consolidated.00.pth": b""}, "makers' own"),
    ({"model.safetensors": None, "m.gguf": b""}, "m.gguf; give that"),
    ({"model.safetensors": None, "model-00001-of-00002.safetensors": b""}, "says what is in"),
    ({"model.safetensors": None}, "holds no model.safetensors and no model.safetensors.index")])
def test_folders_that_hold_something_else(tmp_path, files, words):
    folder = write_folder(tmp_path / "m")
    for name, content in files.items():
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    refused(folder, words)


@pytest.mark.parametrize("settings, words", [
    ({"quant_method": "awq", "bits": 4}, "awq quantized the weights"),
    ({"quant_method": "gptq"}, "gptq quantized"), ({"quant_method": "fp8"}, "fp8 quantized"),
    ({"load_in_4bit": True}, "bitsandbytes quantized"), ({"bits": 2}, "an unknown method"),
    ("qweight", "AWQ or GPTQ quantized"), ("scales", "MLX or GPTQ quantized"),
    ("weight.absmax", "bitsandbytes quantized"), ("weight_scale_inv", "fp8 quantized"),
    ("weight", "fp8 quantized")])
def test_weights_that_others_quantized(tmp_path, settings, words):
    if isinstance(settings, dict):
        folder = write_folder(tmp_path / "m", CONFIG | {"quantization_config": settings})
    else:
        kind = torch.float8_e4m3fn if settings == "weight" else torch.float32
        folder = write_folder(tmp_path / "m", tensors=weights() | {
            f"model.layers.0.mlp.up_proj.{settings}": torch.ones(64, 32, dtype=kind)})
    refused(folder, words, "use the original checkpoint")


def test_the_first_bytes_tell_what_a_file_is(tmp_path):
    file = write_gguf(tmp_path / "m.gguf")
    for name in "M.GGUF", "blob", "m.gguf.txt":
        assert same(open_checkpoint(file.rename(tmp_path / name)), weights())
        file = tmp_path / name
    for name, content, words in (
            ("x", b"PK\3\4", "is a pickle"), ("x.BIN", b"", "is a pickle"), ("x.gguf", LFS, "LFS"),
            ("x.safetensors", b"\x10", "holds only weights; give the folder"),
            ("y.gguf", b"abcd", "it is not a GGUF file, for it begins with b'abcd'"),
            ("z.gguf", b"\n <HTML>", "is a web page"), ("z.xml", b"<?xml", "is a web page"),
            ("bom.gguf", b"\xef\xbb\xbf" + LFS, "LFS"), ("x.txt", b"x", "is no GGUF file; give"),
            ("x.gguf.gz", b"\x1f\x8b\x08", "is packed"), ("x.7z", b"7z\xbc\xaf", "is packed"),
            ("old.bin", b"tjgg\3", "that llama.cpp had before GGUF")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, name, words)
    with pytest.raises(CheckpointError, match="Git LFS"):
        read_parts(tmp_path / "x.gguf")
    refused("x" * 5000, "cannot be read (", "File name too long")
    refused(tmp_path / "nowhere", "does not exist")
    refused(write_gguf(tmp_path / "a.gguf", **{"general.type": "adapter"}), "no model by itself")

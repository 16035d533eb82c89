"""GGUF files: what llama.cpp's converter writes loads; what is damaged is refused."""

import dataclasses
import struct

import gguf
import numpy as np
import pytest
import torch

import checkpoint
from checkpoint import open_checkpoint
from checkpoint.config import parse_config
from checkpoint.conftest import CONFIG, convert_to_gguf, pair, refused, same, weights, write_gguf
from checkpoint.gguf_file import CHUNK, to_float


@pytest.mark.parametrize("arch, name, context", [
    ("llama", "llama, biases, head_dim", None), ("qwen2", "qwen2", None),
    ("qwen3", "qwen3, yarn", None), ("qwen3vl", "qwen3", None),
    ("smollm3", "smollm3, every fourth, tied, biases", None),
    ("olmo2", "olmo2, odd heads, tied", None), ("olmo2", "olmo3, every fourth, odd heads", None),
    ("granite", "granite, odd heads, tied, biases", None), ("granite", "granite 4", None),
    ("mistral3", "ministral3, odd heads, tied, window", None),
    ("phi3", "phi-3, odd heads, tied", None), ("phi3", "phi-3, long context", 256),
    ("phi3", "phi-4-mini, short text", None)])
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


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_quantized(tmp_path, quant):
    """The rows of Llama's q and k come back into their order."""
    kind = gguf.GGMLQuantizationType[quant]

    def rounded(w):
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind),
                                                       kind))

    expected = {name: w if w.ndim == 1 else rounded(w) for name, w in weights().items()}
    found = open_checkpoint(write_gguf(tmp_path / "m.gguf", quant=kind))
    assert same(found, expected) and found.few_bits == (quant not in ("F32", "F16", "BF16"))


@pytest.mark.parametrize("quant", ["Q4_0", "Q5_K", "IQ4_XS"])
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
    ours = open_checkpoint(file).config
    assert ours.rope_divisors == pytest.approx((plain / stretched).tolist(), rel=1e-5)
    assert (ours.rope_factor, ours.context) == (1, 64)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("metadata, changes", [
    ({}, {}), ({"freq_base": 5e5}, {"rope_theta": 5e5}),
    ({"scaling.type": "linear", "scaling.factor": 4.0},
     {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16},
     {"rope_scaling": YARN})])
def test_gguf_rope(tmp_path, metadata, changes):
    """As a config.json says it; without a base, Llama's own, 10,000."""
    metadata = {f"llama.rope.{key}": value for key, value in metadata.items()}
    ours = open_checkpoint(write_gguf(tmp_path / "m.gguf", **metadata)).config
    expected = parse_config(CONFIG | changes)
    assert ours == dataclasses.replace(expected, norm_eps=ours.norm_eps)  # there a float32


FACTORS = {f"rope_factors_{name}.weight": torch.ones(4) for name in ("long", "short")}
ORIGINAL = {"phi3.rope.scaling.original_context_length": 16}


@pytest.mark.parametrize("arch, tensors, metadata, words", [
    ("llama", {}, {"tokenizer.ggml.model": "bert"}, "bert"),
    ("llama", {}, {"tokenizer.ggml.tokens": ["a", "b"]}, "differ in length"),
    ("llama", {}, {"tokenizer.ggml.tokens": ["a"] * 320}, "twice"),
    ("llama", {}, {"tokenizer.ggml.scores": None}, "scores"),
    ("llama", {}, {"tokenizer.ggml.model": "gpt2"}, "merges"),
    ("llama", {}, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "bloom"}, "'bloom'; supp"),
    ("llama", {}, {"tokenizer.ggml.bos_token_id": 9999}, "bos"),
    ("llama", {}, {"llama.block_count": 1000}, "missing"),
    ("llama", {}, {"llama.embedding_length": "many"}, "hidden_size"),
    ("llama", {}, {"llama.attention.head_count_kv": [2, 1]}, "num_key_value_heads"),
    ("llama", {}, {"llama.rope.dimension_count": 4}, "partial_rotary_factor is 0.5"),
    ("llama", {"blk.0.post_attention_norm.weight": torch.ones(32)}, {},
     "blk.0.ffn_norm.weight and blk.0.post_attention_norm.weight have the same meaning"),
    ("llama", {"rope_freqs.weight": torch.ones(9)}, {}, "rope_freqs.weight has shape [9], more"),
    ("llama", {"rope_freqs.weight": torch.ones(3)}, {}, "short_factor is [1.0, 1.0, 1.0]"),
    ("llama", {}, {"llama.rope.scaling.type": "su"}, "'su'"),
    ("granite", {}, {"granite.attention.scale": 0.1, "granite.rope.scaling.finetuned": False},
     "without RoPE"),
    ("phi3", FACTORS, ORIGINAL | {"phi3.rope.dimension_count": 3}, "3 of a head's 8 channels"),
    ("phi3", FACTORS, ORIGINAL | {"phi3.rope.dimension_count": 12}, "factor is 1.56"),
    ("phi3", {"rope_factors_short.weight": torch.ones(4)}, ORIGINAL,
     "rope_factors_long.weight is missing"),
    ("olmo2", {}, {"olmo2.attention.sliding_window": 8,
                   "olmo2.attention.sliding_window_pattern": [True] * 3}, "layer_types is [ True"),
    ("mistral3", {}, {"mistral3.attention.temperature_scale": 0.1},
     "needs rope.scaling.type 'yarn'")])
def test_bad_gguf_metadata(tmp_path, arch, tensors, metadata, words):
    file = write_gguf(tmp_path / "m.gguf", weights() | tensors, arch, **metadata)
    refused(file, "m.gguf", words)


def test_bad_gguf_bytes(tmp_path):
    """Cut off anywhere, too long, or of absurd counts; and a small file cannot claim a large model
    by naming the same bytes many times."""
    good = write_gguf(tmp_path / "good.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for size in 0, 3, 20, 3000, len(good) - 50:
        bad.write_bytes(good[:size])
        refused(bad, "bad.gguf")
    bad.write_bytes(good + bytes(64))
    refused(bad, "its tensors end at byte")
    bad.write_bytes(good[:8] + struct.pack("<QQ", 1 << 60, 1 << 60) + good[24:])
    refused(bad, "claims")
    at = good.index(b"blk.1.attn_k.weight") + 19 + 4 + 16 + 4
    bad.write_bytes(good[:at] + bytes(8) + good[at + 8:])
    refused(bad, "but the one before it ends at")
    refused(write_gguf(bad, arch="mamba"), "mamba", "llama, qwen2")

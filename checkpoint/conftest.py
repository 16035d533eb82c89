"""Checkpoints to test with: every family of transformers at random, folders and GGUF files with
a vocabulary made by hand."""

import copy
import json
import math
import random
import re
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

import checkpoint
from checkpoint import CheckpointError, open_checkpoint
from checkpoint.config import parse_config
from checkpoint.tensors import put, tensor_shapes
from checkpoint.unify import unify
from model import Model

# ---- families ----------------------------------------------------------------------------------

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
               "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
             "original_max_position_embeddings": 32},
    "yarn, its numbers": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0,
                          "original_max_position_embeddings": 32, "beta_fast": 5.0,
                          "beta_slow": 0.5, "mscale": 0.9, "mscale_all_dim": 0.4,
                          "truncate": False},
    "yarn, its factor": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
                         "original_max_position_embeddings": 32, "attention_factor": 1.4},
}
# no pair of channels turns less than once within the original context
ROPE["yarn, all turn"] = ROPE["yarn"] | {"rope_theta": 100.0,
                                         "original_max_position_embeddings": 4096}
ROPE["ministral"] = ROPE["yarn"] | {"mscale": 1.0, "mscale_all_dim": 1.0,
                                    "llama_4_scaling_beta": 0.7}
ROPE["olmo3"] = {"full_attention": ROPE["yarn"], "sliding_attention": ROPE["default"]}
for name, pairs, share in (("longrope", 4, 1.0), ("longrope of 3/4", 6, 0.75)):
    ROPE[name] = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": share,
                  "original_max_position_embeddings": 32,
                  "short_factor": [1 + i / 9 for i in range(pairs)],
                  "long_factor": [1 + i for i in range(pairs)]}
SMALL = dict(vocab_size=101, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
             num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False,
             initializer_range=0.2)
MULTIPLIERS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.2,
               "residual_multiplier": 0.22, "logits_scaling": 3.0, "rms_norm_eps": 0.5}
PHI = {"pad_token_id": None}
CASES = {  # name: (class stem in transformers, changes to SMALL, rope)
    "llama-2": ("Llama", {}, "default"),
    "llama-3.2, tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True},
                        "llama3"),
    "linear rope": ("Llama", {}, "linear"),
    "odd sizes": ("Llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54,
                            "intermediate_size": 53}, "default"),
    "llama, biases, head_dim": ("Llama", {
        "head_dim": 20, "num_key_value_heads": 2, "attention_bias": True}, "default"),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 7}, "default"),
    "ministral, a window on one layer": ("Ministral", {
        "num_key_value_heads": 2, "sliding_window": 7, "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "default"),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}, "default"),
    "qwen2, a window on the last layers, yarn": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "yarn"),
    "qwen3, a window on the first layer": ("Qwen3", {
        "head_dim": 12, "use_sliding_window": True, "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "default"),
    "smollm3, windows": ("SmolLM3", {
        "use_sliding_window": True, "sliding_window": 9, "no_rope_layer_interval": 2,
        "pad_token_id": None}, "yarn"),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12}, "default"),
    "qwen3, yarn": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12}, "yarn"),
    "qwen2, yarn": ("Qwen2", {"num_key_value_heads": 2}, "yarn, its numbers"),
    "smollm3": ("SmolLM3", {"no_rope_layers": [0, 1, 0], "num_key_value_heads": 2,
                            "pad_token_id": None}, "default"),
    "smollm3, every fourth, tied, biases": (
        "SmolLM3", {"num_hidden_layers": 5, "num_key_value_heads": 2, "attention_bias": True,
                    "tie_word_embeddings": True, "pad_token_id": None}, "default"),
    "olmo2, odd heads, tied": (
        "Olmo2", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54,
                  "tie_word_embeddings": True}, "default"),
    "ministral3": ("Ministral3", {"num_key_value_heads": 2, "head_dim": 12,
                                  "pad_token_id": None}, "ministral"),
    "ministral3, odd heads, tied, window": ("Ministral3", {
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10, "pad_token_id": None,
        "tie_word_embeddings": True, "sliding_window": 30}, "ministral"),
    "olmo3": ("Olmo3", {"num_key_value_heads": 2, "sliding_window": 20, "pad_token_id": None,
                        "layer_types": ["sliding_attention", "full_attention",
                                        "sliding_attention"]}, "olmo3"),
    "olmo3, every fourth, odd heads": ("Olmo3", {
        "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54,
        "num_hidden_layers": 4, "sliding_window": 7, "pad_token_id": None}, "olmo3"),
    "granite, odd heads, tied, biases": (
        "Granite", MULTIPLIERS | {"num_attention_heads": 9, "num_key_value_heads": 3,
                                  "hidden_size": 54, "attention_bias": True,
                                  "tie_word_embeddings": True}, "yarn"),
    "granite 4": ("GraniteMoeHybrid", MULTIPLIERS | {
        "num_key_value_heads": 2, "num_local_experts": 0, "shared_intermediate_size": 44,
        "layer_types": ["full_attention"] * 3, "position_embedding_type": "rope",
        "mamba_n_heads": 4, "tie_word_embeddings": True}, "default"),
    "phi-3": ("Phi3", PHI | {"num_key_value_heads": 2, "sliding_window": 20}, "default"),
    "phi-3, odd heads, tied": ("Phi3", PHI | {
        "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54,
        "tie_word_embeddings": True}, "default"),
    "phi-3, long context": ("Phi3", PHI | {"original_max_position_embeddings": 32},
                            "longrope"),
    "phi-3, long context, short text": (
        "Phi3", PHI | {"original_max_position_embeddings": 128}, "longrope"),
    "phi-4-mini": ("Phi3", PHI | {
        "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48,
        "original_max_position_embeddings": 32, "tie_word_embeddings": True},
        "longrope of 3/4"),
    "phi-4-mini, short text": ("Phi3", PHI | {
        "num_key_value_heads": 2, "hidden_size": 64,
        "original_max_position_embeddings": 128}, "longrope of 3/4"),
}
LLAMA = SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def pair(name):
    """A random model of transformers and ours with its weights, from a fresh seed."""
    seed = random.randrange(2**32)
    print(f"{name}: seed {seed}")
    torch.manual_seed(seed)
    stem, changes, rope = CASES[name]
    config = getattr(transformers, f"{stem}Config")(
        **SMALL | changes, rope_parameters=copy.deepcopy(ROPE[rope]))
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{stem}ForCausalLM")(config).float().eval()
    for parameter_name, parameter in theirs.named_parameters():  # fresh ones are all 1 or all 0
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.2)
    config_json = config.to_dict() | {"architectures": [f"{stem}ForCausalLM"]}
    # Beyond its original context, longrope wants to be asked for.
    longer = changes.get("original_max_position_embeddings") == 32
    ours = Model(parse_config(config_json, 256 if longer else None))
    state = theirs.state_dict()
    _, read, _ = unify(config_json, ours.config, {n: tuple(t.shape) for n, t in state.items()},
                    lambda name, part: state[name][part])
    for tensor_name in tensor_shapes(ours.config):
        put(ours, tensor_name, read(tensor_name))
    return theirs, ours


# ---- folders and GGUF files --------------------------------------------------------------------

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# A SentencePiece vocabulary made by hand: each merge makes a piece that no other merge makes.
CHARACTERS = list("▁abdehinorstuw.,é")
MERGES = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a"), ("▁a", "n"), ("▁an", "d"),
          ("o", "r"),
          ("e", "r"), ("▁", "w"), ("▁w", "or"), ("t", "s"), ("▁", "▁")]
SPECIAL = ["<unk>", "<s>", "</s>"]
PIECES = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *("".join(m) for m in MERGES),
          *CHARACTERS]
PIECES += [f"unused{i}" for i in range(320 - len(PIECES))]


def strings(n=200):
    """Text of every kind: words, code, emoji, many scripts, white space, random characters."""
    made = ["", " ", "  ", "\n", "\t\n \r\n", " " * 300, "Hello, world!", "the and the wor in ts",
            "I'm don't we'LL 12345 3.14", "def f(x):\n    return x**2  # é\n\n\n",
            "👩‍👩‍👧‍👦🇫🇷 ok", "日本語のテキスト", "Ünïcödé ẞ ﬁ Å e\u0301", "مرحبا بالعالم",
            "<|im_end|>x<|im_start|>", "a" * 500, "\x00\x7f\x80\ufffd", "trailing  ", "  leading",
            "mixed\u00a0spaces\u3000here", "https://a.b/c?d=e&f=%20"]
    rng = random.Random(0)
    ranges = [(32, 127), (32, 127), (0xA0, 0x250), (0x400, 0x500), (0x4E00, 0x9FFF),
              (0x1F300, 0x1F6FF), (9, 14)]
    while len(made) < n:
        made.append("".join(chr(rng.randrange(*rng.choice(ranges)))
                            for _ in range(rng.randrange(1, 60))))
    return made


def weights(config=CONFIG, seed=0):
    """Random tensors of every shape a config needs."""
    g = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(parse_config(config))
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def spm_tokenizer():
    """The hand-made vocabulary as Llama-2's tokenizer.json would have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(PIECES)}, MERGES,
                                                unk_token="<unk>",
                                                fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"],
                                                             special_tokens=[("<s>", 1)])
    return tokenizer


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def bpe(special=(), plain=(), merges=()):
    """Byte-level BPE: bytes, what `merges` such as "t h" make, and added tokens."""
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)}, [tuple(merge.split()) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return tokenizer


def write_folder(folder, config=CONFIG, tensors=None, tokenizer=None, **files):
    """A Hugging Face folder; `files` are further JSON files by name without suffix."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config) if tensors is None else tensors, folder / "model.safetensors")
    (tokenizer or spm_tokenizer()).save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def write_gguf(file, tensors=None, arch="llama", quant=None, whole=None, **metadata):
    """A GGUF file with the hand-made vocabulary, Llama's q and k in llama.cpp's order. Matrices are
    of type `quant`, if any, but for those named `whole`."""
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    values = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(MERGES))]
        + [-100.0] * (61 - len(MERGES)),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (320 - 259)} | metadata
    add_metadata(writer, values)
    to_gguf = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
               "lm_head": "output"}
    blocks = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              "self_attn.o_proj": "attn_output"}
    blocks |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    blocks |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for name, tensor in (weights() if tensors is None else tensors).items():
        module, kind = name.rsplit(".", 1)
        for i in range(2):
            if module.startswith(f"model.layers.{i}."):
                module = f"blk.{i}." + blocks[module.removeprefix(f"model.layers.{i}.")]
        array = tensor.float().numpy()
        if arch == "llama" and ("attn_q" in module or "attn_k" in module):
            heads = 4 if "attn_q" in module else 2
            rows = array.reshape(heads, 2, 4, *array.shape[1:])
            array = rows.swapaxes(1, 2).reshape(array.shape)
        array = np.ascontiguousarray(array)
        if quant is not None and array.ndim == 2 and module.split(".")[-1] != whole:
            writer.add_tensor(f"{to_gguf.get(module, module)}.{kind}",
                              gguf.quants.quantize(array, quant),
                              raw_dtype=quant)
        else:
            writer.add_tensor(f"{to_gguf.get(module, module)}.{kind}", array)
    write_out(writer)
    return file


def write_bpe(file, control=(), normal=(), merges=("1 2", "12 3"), arch="llama", quant=None,
              **changes):
    """A GGUF file with a byte-level vocabulary -> (file, tokens): bytes, merges, then `control` and
    `normal`. changes: of tokenizer.ggml.*, and chat_template"""
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in merges), *control, *normal]
    types = [1] * (len(tokens) - len(control) - len(normal)) + [3] * len(control)
    values = {"model": "gpt2", "tokens": tokens, "token_type": types + [1] * len(normal),
              "merges": [*merges], "scores": None, "bos_token_id": None, "eos_token_id": None,
              "unknown_token_id": None, "pre": None} | changes
    names = {key: f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}" for key in values}
    biased = {"model_type": "qwen2", "architectures": None} if arch == "qwen2" else {}
    return write_gguf(file, weights(CONFIG | biased), arch, quant,
                      **{names[key]: value for key, value in values.items()}), tokens


def write_out(writer):
    """Write what a GGUFWriter has gathered to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer, values):
    """Add {key: value} to a GGUFWriter; a None is left out."""
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            kind = {str: "string", bool: "bool", int: "uint32", float: "float32"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)


def convert_to_gguf(theirs, file, arch, reordered):
    """Write a model of transformers as llama.cpp's converter would, with a bare vocabulary.

    The names are those of the package gguf. reordered: whether the rows of q and k are.
    """
    config, writer = theirs.config, gguf.GGUFWriter(file, arch)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    state = theirs.state_dict()
    if config.model_type == "granitemoehybrid":  # its dense models
        writer.add_feed_forward_length(config.shared_intermediate_size)
        writer.add_head_count_kv([config.num_key_value_heads] * config.num_hidden_layers)
        writer.add_rope_scaling_finetuned(True)
        for name in [name for name in state if "shared_mlp" in name]:
            if "input" in name:
                for part, tensor in zip(("gate", "up"), state[name].chunk(2)):
                    state[name.replace("shared_mlp.input_linear", f"mlp.{part}_proj")] = tensor
            else:
                state[name.replace("shared_mlp.output_linear", "mlp.down_proj")] = state[name]
            del state[name]
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = config.hidden_size // config.num_attention_heads
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key in ("attention_factor", "beta_fast", "beta_slow"):
            if key in rope:
                key = key.replace("attention", "attn")
                getattr(writer, f"add_rope_scaling_yarn_{key}")(rope[key])
    if config.model_type == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "olmo3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention"
                                           for kind in config.layer_types])
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if arch == "phi3":
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_sliding_window(config.sliding_window or 0)
        original = rope.get("original_max_position_embeddings")
        if "long_factor" in rope:
            stretch = config.max_position_embeddings / original
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_attn_factors(
                math.sqrt(1 + math.log(stretch) / math.log(original)))
            for length in ("long", "short"):
                writer.add_tensor(f"rope_factors_{length}.weight",
                                  np.array(rope[f"{length}_factor"], np.float32))
    n = config.vocab_size
    add_metadata(writer, {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": PIECES[:n],
        "tokenizer.ggml.scores": [0.0] * n, "tokenizer.ggml.token_type": [1] * n,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2})
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".")[-2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if reordered and part in heads:
            rows = tensor.unflatten(0, (heads[part], 2, -1))
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        name, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(name)}.{suffix}", tensor.contiguous().numpy())
    write_out(writer)
    return file


def same(checkpoint, tensors):
    found = dict(checkpoint.tensors)
    assert found.keys() == tensors.keys()
    return all(torch.equal(found[name].float(), tensor.float())
               for name, tensor in tensors.items())


def refused(path, *words):
    """Opening `path` is refused, soon, in one sentence that holds the words."""
    start = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    assert time.monotonic() - start < 5
    message = str(error.value)
    assert "\n" not in message and len(message) < 800
    for word in words:
        assert word in message, message


@pytest.fixture(scope="session")
def default():
    return open_checkpoint()


def resident(field):
    """Bytes of this process in memory: now, "VmRSS", or at its peak, "VmHWM"."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

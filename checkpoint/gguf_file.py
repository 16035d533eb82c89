"""Opens a GGUF file: one file with a model's numbers, its weights (often of few bits) and its
vocabulary.

The header comes first: counts, metadata as typed key-value pairs, and each tensor's shape, type
and place. Then come the tensors. The header is read here and not by the `gguf` package, for two
reasons. The package takes seconds over a vocabulary of 50,000 strings. And every count and length
in a stranger's file is a claim, to be compared with the file's size before it is believed. The
package turns quantized blocks into numbers. What leaves this file is as Hugging Face has it: the
dictionary of a config.json, tensor names, the order of the rows of q and k.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import re
import struct

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from checkpoint.config import FAMILIES, parse_config
from checkpoint.files import one_line
from checkpoint.gguf_tokenizer import build_tokenizer, special_token
from checkpoint.opened import Checkpoint, CheckpointError
from checkpoint.rope import parse_rope
from checkpoint.tensors import check_shapes
from checkpoint.tokenizer import Tokenizer
from checkpoint.unify import unify

HEADER_LIMIT = 32 << 20  # bytes; with 260,000 tokens it takes about 15 MB
COUNT_LIMIT = 1 << 16  # of metadata entries, and of tensors
CHUNK = 1 << 17  # weights dequantized at a time; they stay in the cache, twice as fast as all

SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
           10: "<u8", 11: "<i8", 12: "<f8"}  # type in the header -> dtype
UINT32, STRING, ARRAY, UINT64 = 4, 8, 9, 10

ARCHITECTURES = {  # name in the file -> model_type in config.json; OLMo 3 is an olmo2 here
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3", "olmo2": "olmo2",
    "granite": "granite", "phi3": "phi3", "mistral3": "ministral3", "qwen3vl": "qwen3_vl_text"}
# those whose rows of q and k are in another order (see `GGUFFile.read`)
REORDERED = ("llama", "smollm3", "granite", "mistral3")
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",  # OLMo 2's, behind the block
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
PHI3_NAMES = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def open_gguf(file):
    """A .gguf file (Path) -> Checkpoint. Raises CheckpointError."""
    try:
        gguf = GGUFFile(file)
        config_json = gguf.config()
        config_json |= gguf.rope(parse_config(config_json))
        config = parse_config(config_json)
        shapes, read = unify(config_json, config, gguf.shapes(), gguf.read)
        shapes = check_shapes(config, shapes)
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        special = {f"{short}_token": special_token(gguf.metadata, role)
                   for short, role in roles.items()}
        tokenizer = Tokenizer(build_tokenizer(gguf.metadata, config.vocab_size),
                              config.vocab_size, special, [config_json["eos_token_id"]],
                              gguf.metadata.get("tokenizer.chat_template"))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from None
    few_bits = all(GGML_QUANT_SIZES[quant][0] > 1  # weights in a block
                   for name, (shape, quant, _) in gguf.tensors.items()
                   if name.startswith("blk.") and len(shape) == 2)
    return Checkpoint(config, tokenizer, [file], shapes, read, config_json, few_bits=few_bits)


# ---- the header --------------------------------------------------------------------------------

class Header:
    """A cursor over the file's first bytes. It never reads past their end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def skip(self, n):
        """Move n bytes on; returns where they start."""
        if n > len(self.data) - self.at:
            raise ValueError(f"its header ends early or is larger than {HEADER_LIMIT >> 20} MiB "
                             f"(at byte {self.at})")
        self.at += n
        return self.at - n

    def array(self, kind, count):
        """`count` numbers of one type, as a NumPy array."""
        if kind not in SCALARS:
            raise ValueError(f"its header has a value of unknown type {kind} at byte {self.at}")
        dtype = np.dtype(SCALARS[kind])
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, start).copy()

    def strings(self, count):
        """`count` strings, each a uint64 length, then UTF-8."""
        result, length = [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            n, = length(self.data, self.skip(8))
            start = self.skip(n)
            try:
                result.append(self.data[start:start + n].decode())
            except UnicodeDecodeError:
                raise ValueError(
                    f"its header has a string that is not UTF-8 at byte {start}") from None
        return result

    def value(self, kind):
        """One value of a type: a number, a bool, a string, or a flat array of one of these."""
        if kind == STRING:
            return self.strings(1)[0]
        if kind == ARRAY:
            kind, count = self.value(UINT32), self.value(UINT64)
            return self.strings(count) if kind == STRING else self.array(kind, count)
        return self.array(kind, 1)[0].item()


class GGUFFile:
    """A GGUF file, checked.

    metadata: {key: value}
    tensors: {GGUF name: (shape, type, offset in the file)}
    Raises ValueError.
    """

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as f:
            header = Header(f.read(HEADER_LIMIT))
        if header.data[:4] != b"GGUF":
            raise ValueError("it is not a GGUF file (its first four bytes are not GGUF)")
        header.skip(4)
        version = header.value(UINT32)
        if version not in (2, 3):
            raise ValueError(f"its GGUF version is {version}; supported are 2 and 3, "
                             "little-endian")
        n_tensors, n_entries = header.value(UINT64), header.value(UINT64)
        if max(n_tensors, n_entries) > COUNT_LIMIT:
            raise ValueError(f"its header claims {n_tensors} tensors and {n_entries} metadata "
                             "entries")
        self.metadata = {header.value(STRING): header.value(header.value(UINT32))
                         for _ in range(n_entries)}
        records = {}
        for _ in range(n_tensors):
            name, n_dims = header.value(STRING), header.value(UINT32)
            if name in records or not 1 <= n_dims <= 4:
                raise ValueError(
                    f"tensor {name[:80]!r} appears twice or has {n_dims} dimensions")
            shape = tuple(header.array(UINT64, n_dims).tolist()[::-1])  # innermost comes first
            records[name] = shape, header.value(UINT32), header.value(UINT64)
        self.tensors = self.place_tensors(records, header.at)

        self.arch = self.metadata.get("general.architecture")
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unsupported GGUF architecture {self.arch!r}; supported are "
                             f"{', '.join(ARCHITECTURES)}")
        self.names = {}
        for name in self.tensors:
            if (other := self.names.setdefault(hf_name(name, self.arch), name)) != name:
                raise ValueError(f"tensors {other} and {name} have the same meaning")
        if "token_embd.weight" not in self.tensors:
            raise ValueError("tensor token_embd.weight is missing")

    def place_tensors(self, records, header_end):
        """{name: (shape, type number, offset after the header)} -> `tensors`.

        The tensors must lie one behind the other and fill the file. Anything else is a mistake in
        a type, a size or an offset, and would mean wrong weights.
        """
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"general.alignment is {alignment!r}")
        size = os.path.getsize(self.path)
        start = end = -(-header_end // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in records.items():
            try:
                quant = GGMLQuantizationType(kind)
                block, block_bytes = GGML_QUANT_SIZES[quant]
                dequantize(np.zeros((1, block_bytes), np.uint8), quant)  # can it be?
            except (ValueError, NotImplementedError):
                raise ValueError(f"tensor {name} has type {kind}, which is not supported; use "
                                 "another one") from None
            n_bytes = math.prod(shape) // block * block_bytes
            if shape[-1] % block or start + offset + n_bytes > size:
                raise ValueError(f"tensor {name}, {quant.name} {list(shape)} at byte "
                                 f"{start + offset}, does not fit in the file's {size} bytes; "
                                 "the file is damaged or its download unfinished")
            if start + offset != end:
                raise ValueError(f"tensor {name} is at byte {start + offset}, but the one before "
                                 f"it ends at {end}; the file is damaged")
            tensors[name] = shape, quant, end
            end += -(-n_bytes // alignment) * alignment
        if size > end:
            raise ValueError(f"its tensors end at byte {end}, but it has {size}; the file is "
                             "damaged")
        return tensors

    def get(self, key, default=None):
        """A metadata value of the architecture."""
        return self.metadata.get(f"{self.arch}.{key}", default)

    def heads(self):
        """The number of heads of queries, and of keys and values; values unchecked."""
        n_heads = self.get("attention.head_count")
        n_kv_heads = self.get("attention.head_count_kv", n_heads)
        if isinstance(n_kv_heads, np.ndarray) and len({*n_kv_heads.tolist()}) == 1:
            n_kv_heads = n_kv_heads[0].item()  # the same for every layer, as Granite 4 has it
        return n_heads, n_kv_heads

    def config(self):
        """The metadata as the dictionary of a config.json, values unchecked.

        Without what GGUF keeps in tensors (`rope`).
        """
        n_heads, n_kv_heads = self.heads()
        rope_dim = self.get("rope.dimension_count")
        head_dim = self.get("attention.key_length", None if self.arch == "phi3" else rope_dim)
        if rope_dim not in (head_dim, None) and self.arch != "phi3":
            raise ValueError(f"it rotates {rope_dim} of {head_dim} dimensions of a head; only "
                             "all is supported")
        model_type = ARCHITECTURES[self.arch]
        if self.arch == "olmo2" and self.get("attention.sliding_window"):
            model_type = "olmo3"
        windowed = self.get("attention.sliding_window_pattern")
        if isinstance(windowed, np.ndarray) and len(windowed) == self.get("block_count"):
            windowed = ["sliding_attention" if flag else "full_attention" for flag in windowed]
        ends = [self.metadata.get(f"tokenizer.ggml.{role}_token_id")
                for role in ("eos", "eot", "eom")]
        config = {
            "model_type": model_type,
            "architectures": [FAMILIES[model_type]],
            "vocab_size": self.tensors["token_embd.weight"][0][0],
            "hidden_size": self.get("embedding_length"),
            "intermediate_size": self.get("feed_forward_length"),
            "num_hidden_layers": self.get("block_count"),
            "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self.get("context_length"),
            "sliding_window": self.get("attention.sliding_window") or None,
            "layer_types": windowed,
            "rms_norm_eps": self.get("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.get("rope.freq_base", 10000.0),
            "rope_parameters": {},  # a config.json may mean YaRN without saying so
            "rope_scaling": self.rope_scaling(),
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": [i for i in ends if i is not None],
        }
        if self.arch == "granite":
            if self.get("attention.scale") is None or not self.get("rope.scaling.finetuned", True):
                raise ValueError("it is a Granite without granite.attention.scale or without RoPE, "
                                 "which is not supported")
            config |= {"attention_multiplier": self.get("attention.scale"),
                       "embedding_multiplier": self.get("embedding_scale"),
                       "residual_multiplier": self.get("residual_scale"),
                       "logits_scaling": self.get("logit_scale")}
        return config

    def rope_scaling(self):
        """The rope_scaling of a config.json, as far as it is metadata; None for the plain RoPE."""
        kind = self.get("rope.scaling.type", "none")
        growth = self.get("attention.temperature_scale")  # of queries with their position
        if growth and kind != "yarn":
            raise ValueError("its attention.temperature_scale needs rope.scaling.type 'yarn'")
        if kind == "none" or any(name in self.tensors for name in ROPE_TENSORS):
            return None
        values = {"factor": self.get("rope.scaling.factor"),
                  "original_max_position_embeddings":
                      self.get("rope.scaling.original_context_length"),
                  "attention_factor": self.get("rope.scaling.attn_factor",
                                               self.get("rope.scaling.yarn_attn_factor")),
                  "beta_fast": self.get("rope.scaling.yarn_beta_fast"),
                  "beta_slow": self.get("rope.scaling.yarn_beta_slow"),
                  "llama_4_scaling_beta": growth}
        if self.get("rope.scaling.yarn_log_multiplier"):
            values |= {"mscale": 1.0,
                       "mscale_all_dim": self.get("rope.scaling.yarn_log_multiplier")}
        return {"rope_type": kind, **{k: v for k, v in values.items() if v is not None}}

    def rope(self, config):
        """What a config.json says of RoPE that GGUF keeps in tensors; config: without it."""
        def read(name):
            if name not in self.tensors:
                raise ValueError(f"tensor {name} is missing")
            if math.prod(self.tensors[name][0]) > config.head_dim:
                raise ValueError(f"tensor {name} has shape {list(self.tensors[name][0])}, more "
                                 f"than a head of {config.head_dim} dimensions needs")
            return self.read(name).flatten()

        if "rope_freqs.weight" in self.tensors:
            return {"rope_scaling": llama3_scaling(read("rope_freqs.weight"), config)}
        found, turned = {}, self.get("rope.dimension_count", config.head_dim)
        if turned != config.head_dim:  # Phi-4-mini
            # half a dimension more, because the product with head_dim is rounded down
            found["partial_rotary_factor"] = (turned + 0.5) / config.head_dim
        if "rope_factors_short.weight" in self.tensors:
            found["rope_scaling"] = {
                "rope_type": "longrope",
                "short_factor": read("rope_factors_short.weight").tolist(),
                "long_factor": read("rope_factors_long.weight").tolist(),
                "attention_factor": self.get("rope.scaling.attn_factor")}
            found["original_max_position_embeddings"] = self.get(
                "rope.scaling.original_context_length")
        return found

    def shapes(self):
        """{Hugging Face name: shape [out_features, in_features]} of the weights."""
        return {hf: self.tensors[name][0] for hf, name in self.names.items()
                if name not in ROPE_TENSORS}

    def read(self, hf, part=...):
        """A weight, or slices of it, by its Hugging Face name: float32 [out, in] on the CPU."""
        name = self.names[hf]
        shape, quant, offset = self.tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[quant]
        n_bytes = math.prod(shape) // block * block_bytes
        raw = np.fromfile(self.path, np.uint8, n_bytes, offset=offset)
        kind = name.split(".")[-2]
        if self.arch in REORDERED and kind in ("attn_q", "attn_k"):
            # llama.cpp rotates neighbours (2i, 2i + 1), where Hugging Face rotates the pairs
            # (i, i + head_dim / 2). So it reorders the rows of q and k (of a bias, its elements).
            # Put them back while they are still small.
            n_heads = self.heads()[kind == "attn_k"]
            row_bytes = len(raw) // shape[0]
            raw = raw.reshape(n_heads, -1, 2, row_bytes).swapaxes(1, 2)
        return to_float(shape, quant, raw)[part]


def llama3_scaling(divisors, config):
    """The rope_scaling of a config.json for the divisors of RoPE's frequencies, [head_dim / 2].

    GGUF keeps only this result of Llama-3's scaling. All Llama-3 models share its parameters but
    for the factor, which is the divisor of the lowest frequency. So guess, and compare.
    """
    scaling = {"rope_type": "llama3", "factor": divisors.flatten()[-1].item(),
               "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    expected = parse_rope({"rope_theta": config.rope_theta, "rope_scaling": scaling,
                           "max_position_embeddings": 8192}, config.head_dim)["rope_divisors"]
    expected = torch.tensor(expected)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise ValueError("its rope_freqs.weight does not follow Llama-3's formula, the only one "
                         "supported")
    return scaling if scaling["factor"] != 1 else None


def hf_name(name, arch):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; others stay as they are."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
        names = BLOCK_NAMES | PHI3_NAMES if arch == "phi3" else BLOCK_NAMES
        if match[2] in names:
            return f"model.layers.{match[1]}.{names[match[2]]}.{kind}"
    return f"{NAMES[module]}.{kind}" if module in NAMES else name


def to_float(shape, quant, raw):
    """Quantized blocks (uint8, any shape) -> float32 tensor of the given shape."""
    result = np.empty(math.prod(shape), np.float32)
    block, block_bytes = GGML_QUANT_SIZES[quant]
    raw = raw.reshape(-1, block_bytes)
    step = CHUNK // block
    with np.errstate(invalid="ignore", over="ignore"):  # `put` refuses infinite and NaN weights
        for i in range(0, len(raw), step):
            floats = dequantize(raw[i:i + step].reshape(1, -1), quant)[0]
            result[i * block:(i + step) * block] = floats
    return torch.from_numpy(result.reshape(shape))

"""Opens a GGUF file: one file with a model's numbers, its weights (often of few bits) and its
vocabulary.

gguf_container.py reads the header, the package `gguf` turns quantized blocks into numbers. What
this file returns has Hugging Face's form: the dictionary of a config.json, tensor names, the
order of the rows of q and k.
"""

import math
import re

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import Q4_K, dequantize

from checkpoint.config import parse_config
from checkpoint.files import one_line
from checkpoint.gguf_container import read_parts
from checkpoint.gguf_tokenizer import open_gguf_tokenizer
from checkpoint.opened import Checkpoint, CheckpointError
from checkpoint.tensors import check_shapes
from checkpoint.unify import unify
from cpu.packed import Groups

CHUNK = 1 << 17  # weights dequantized at a time; they stay in the cache, twice as fast as all

ARCHITECTURES = {  # name in the file -> model_type in config.json; OLMo 3 is an olmo2 here
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3", "olmo2": "olmo2",
    "granite": "granite", "phi3": "phi3", "mistral3": "ministral3", "qwen3vl": "qwen3_vl_text"}
# those whose rows of q and k are in another order (see `GGUFFile.read`)
REORDERED = ("llama", "smollm3", "granite", "mistral3")
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",  # OLMo 2's, after the block
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
PHI3_NAMES = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
# Keys that change what the model computes, and the values with which it is computed here.
FIXED = {"attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,), "attention.causal": (1,),
         "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "expert_count": (0,),
         "use_parallel_residual": (0,), "rope.scaling.yarn_ext_factor": (1, -1)}
FACTORS = {"attention.scale": "attention_multiplier", "logit_scale": "logits_scaling",  # Granite's
           "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier"}
# Types whose own numbers cpu/packed.py multiplies: bits, offset
GROUPED = {"Q4_0": (4, 8), "Q4_1": (4, 0), "Q5_0": (5, 16), "Q5_1": (5, 0), "Q8_0": (8, 128),
           "Q4_K": (4, 0), "Q5_K": (5, 0), "Q6_K": (6, 32)}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def open_gguf(file):
    """A .gguf file (Path) -> Checkpoint. Raises CheckpointError."""
    try:
        gguf = GGUFFile(file)
        config_json = gguf.config()
        config_json |= gguf.rope(parse_config(config_json).head_dim)
        config = parse_config(config_json)
        shapes, read, origins = unify(config_json, config, gguf.shapes(), gguf.read)
        shapes = check_shapes(config, shapes)
        tokenizer = open_gguf_tokenizer(gguf.metadata, config.vocab_size,
                                        config_json["eos_token_id"])
    except CheckpointError:  # of another part
        raise
    except Exception as error:  # the tokenizers package raises plain Exception
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from None
    stored = {name: gguf.tensors[gguf.names[origins[name]]] for name in shapes}
    types = {name: quant for name, (shape, quant, *_) in stored.items() if len(shape) == 2}
    few_bits = all(GGML_QUANT_SIZES[quant][0] > 1  # weights in a block
                   for name, quant in types.items() if name.startswith("model.layers."))
    # unify() changes some families' weights
    own = {quant.name for quant in types.values()} <= GROUPED.keys() and gguf.arch not in (
        "granite", "phi3")
    sources = {name: path for name, (*_, path) in stored.items()}
    files = sorted({path for *_, path in gguf.tensors.values()})
    return Checkpoint(config, tokenizer, files, shapes, read, sources, config_json,
                      few_bits=few_bits, groups=gguf.groups if own else None)


# ---- what the file means ------------------------------------------------------------------------

class GGUFFile:
    """A GGUF file, checked.

    metadata: {key: value}
    tensors: {GGUF name: (shape, type, offset in the file, file)}
    Raises ValueError.
    """

    def __init__(self, path):
        self.metadata, self.tensors = read_parts(path)
        self.arch = self.metadata.get("general.architecture")
        if (kind := self.metadata.get("general.type", "model")) != "model":
            raise ValueError(f"it is no model by itself (its general.type is {kind!r}); give the "
                             "GGUF file of the model, into which an adapter must be merged")
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unsupported GGUF architecture {self.arch!r}; supported are "
                             f"{', '.join(ARCHITECTURES)}")
        self.names = {}
        for name in self.tensors:
            if (other := self.names.setdefault(hf_name(name, self.arch), name)) != name:
                raise ValueError(f"tensors {other} and {name} have the same meaning")
        if "token_embd.weight" not in self.tensors:
            raise ValueError("tensor token_embd.weight is missing")

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
        head_dim = self.get("attention.key_length")
        if head_dim not in (None, self.get("attention.value_length", head_dim)):
            raise ValueError("its heads have other sizes for values than for keys")
        fixed = FIXED | ({} if self.arch == "granite" else dict.fromkeys(FACTORS, (0, 1)))
        for key, allowed in fixed.items():
            if self.get(key) not in (None, *allowed):
                raise ValueError(f"{self.arch}.{key} is {self.get(key)!r}; only {allowed[0]} is "
                                 "supported")
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
            config |= {name: self.get(key) for key, name in FACTORS.items()}
        return config

    def rope_scaling(self):
        """The rope_scaling of a config.json, as far as it is metadata; None for the plain RoPE."""
        factor = self.get("rope.scaling.factor", self.get("rope.scale_linear"))  # the older key
        kind = self.get("rope.scaling.type", "linear" if factor not in (None, 0, 1) else "none")
        growth = self.get("attention.temperature_scale")  # of queries with their position
        if growth and kind != "yarn":
            raise ValueError("its attention.temperature_scale needs rope.scaling.type 'yarn'")
        if any(name in self.tensors for name in ROPE_TENSORS):
            if kind in ("linear", "yarn") and factor not in (None, 0, 1):
                raise ValueError(f"it slows RoPE by a {kind} factor of {factor} and by a tensor; "
                                 "only one of them is supported")
            return None
        if kind == "none":
            return None
        values = {"factor": factor,
                  "original_max_position_embeddings":
                      self.get("rope.scaling.original_context_length"),
                  "attention_factor": self.get("rope.scaling.attn_factor",
                                               self.get("rope.scaling.yarn_attn_factor")),
                  "beta_fast": self.get("rope.scaling.yarn_beta_fast"),
                  "beta_slow": self.get("rope.scaling.yarn_beta_slow"),
                  "mscale": 1.0,
                  "mscale_all_dim": self.get("rope.scaling.yarn_log_multiplier"),
                  "llama_4_scaling_beta": growth}
        return {"rope_type": kind, **{k: v for k, v in values.items() if v is not None}}

    def rope(self, head_dim):
        """What a config.json says of RoPE that GGUF keeps in tensors: divisors, as for longrope."""
        def read(name):
            if name not in self.tensors:
                raise ValueError(f"tensor {name} is missing")
            if math.prod(self.tensors[name][0]) > head_dim:
                raise ValueError(f"tensor {name} has shape {list(self.tensors[name][0])}, more "
                                 f"than a head of {head_dim} dimensions needs")
            return self.read(name).flatten().tolist()

        found, turned = {}, self.get("rope.dimension_count", head_dim)
        if turned != head_dim:  # Phi-4-mini
            # half a dimension more, because the product with head_dim is rounded down
            found["partial_rotary_factor"] = (turned + 0.5) / head_dim
        freqs, short, long = ROPE_TENSORS
        original = self.get("rope.scaling.original_context_length")
        if freqs in self.tensors:  # Llama 3's: the same for texts of every length
            short, long, original = freqs, freqs, self.get("context_length")
        if short in self.tensors:
            found["original_max_position_embeddings"] = original
            found["rope_scaling"] = {"rope_type": "longrope", "short_factor": read(short),
                                     "long_factor": read(long),
                                     "attention_factor": self.get("rope.scaling.attn_factor")}
        return found

    def shapes(self):
        """{Hugging Face name: shape [out_features, in_features]} of the weights."""
        return {hf: self.tensors[name][0] for hf, name in self.names.items()
                if name not in ROPE_TENSORS}

    def read(self, hf, part=...):
        """A weight, or slices of it, by its Hugging Face name: float32 [out, in] on the CPU."""
        return to_float(*self.raw(hf))[part]

    def groups(self, hf):
        """The `Groups` of a matrix, by its Hugging Face name; None if its type has none."""
        shape, quant, raw = self.raw(hf)
        return groups_of(quant, raw.reshape(shape[0], -1))

    def raw(self, hf):
        """(shape, type, blocks) of a weight by its Hugging Face name, its rows in their order."""
        name = self.names[hf]
        shape, quant, offset, path = self.tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[quant]
        n_bytes = math.prod(shape) // block * block_bytes
        raw = np.fromfile(path, np.uint8, n_bytes, offset=offset)
        kind = name.split(".")[-2]
        if self.arch in REORDERED and kind in ("attn_q", "attn_k"):
            # llama.cpp rotates neighbours (2i, 2i + 1), where Hugging Face rotates the pairs
            # (i, i + head_dim / 2). So it reorders the rows of q and k (of a bias, its elements).
            # Put them back while they are still small.
            n_heads = self.heads()[kind == "attn_k"]
            row_bytes = len(raw) // shape[0]
            raw = raw.reshape(n_heads, -1, 2, row_bytes).swapaxes(1, 2)
        return shape, quant, raw


def hf_name(name, arch):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; others stay as they are."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
        names = BLOCK_NAMES | PHI3_NAMES if arch == "phi3" else BLOCK_NAMES
        if match[2] in names:
            return f"model.layers.{match[1]}.{names[match[2]]}.{kind}"
    return f"{NAMES[module]}.{kind}" if module in NAMES else name


def groups_of(quant, raw):
    """The `Groups` of a type in `GROUPED`, from its blocks, uint8 [out_features, bytes of a row].

    A block begins with its scale d, and the minimum where there is one. Of the types with K it has
    super-blocks of 256 weights, whose groups multiply d and the minimum by integers.
    """
    blocks = raw.reshape(len(raw), -1, GGML_QUANT_SIZES[quant][1])  # [out_features, blocks, bytes]

    def halves(at):
        return blocks[..., at:at + 2].copy().view(np.float16).astype(np.float32)  # [..., 1]

    minimum = None
    if quant.name == "Q6_K":
        scale = halves(208) * blocks[..., 192:208].view(np.int8)
    elif quant.name in ("Q4_K", "Q5_K"):
        scales, minima = Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
        scale, minimum = (halves(at) * x.reshape(*blocks.shape[:2], 8)
                          for at, x in ((0, scales), (2, minima)))
        minimum = -minimum
    else:
        scale, minimum = halves(0), halves(2) if quant.name in ("Q4_1", "Q5_1") else None
    scale, minimum = (None if x is None else torch.from_numpy(x.reshape(len(raw), -1))
                      for x in (scale, minimum))
    return Groups(*GROUPED[quant.name], scale, minimum)


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

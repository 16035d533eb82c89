"""Reads a GGUF file: one file that holds a model's numbers, its weights (often quantized) and its vocabulary.

Layout: a header (counts, then metadata as typed key-value pairs, then one record per tensor with its shape, type and
offset), then the tensors' bytes. The header is read here by hand, for two reasons: a general reader takes seconds over
a vocabulary of 50,000 strings, and every count and length in a downloaded file is a claim that has to be checked
against the file's size before it is believed. Blocks of quantized weights are turned into numbers by the `gguf`
package. Everything leaves this file in Hugging Face terms: a config.json dictionary, Hugging Face tensor names, q and
k rows in Hugging Face order, a `tokenizers` tokenizer. Whatever is wrong is a ValueError of one sentence.

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
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HEADER_LIMIT = 32 << 20  # bytes; the headers of models with 260,000 tokens take about 15 MB
COUNT_LIMIT = 1 << 16  # of metadata entries, and of tensors
CHUNK = 1 << 17  # weights dequantized at a time: their temporaries stay in the cache, twice as fast as a whole tensor

SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


class Header:
    """A cursor over the file's first bytes that never reads past what is there."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def skip(self, n):
        """Move n bytes on and return where they start."""
        if n > len(self.data) - self.at:
            raise ValueError(f"its header ends early or is larger than {HEADER_LIMIT >> 20} MiB (at byte {self.at})")
        self.at += n
        return self.at - n

    def array(self, kind, count):
        """`count` numbers of one type, as a numpy array."""
        if kind not in SCALARS:
            raise ValueError(f"its header has a value of unknown type {kind} at byte {self.at}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.data, dtype, count, self.skip(count * dtype.itemsize)).copy()

    def strings(self, count):
        """`count` strings: each a uint64 length, then UTF-8."""
        result, length = [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            n, = length(self.data, self.skip(8))
            start = self.skip(n)
            try:
                result.append(self.data[start:start + n].decode())
            except UnicodeDecodeError:
                raise ValueError(f"its header has a string that is not UTF-8 at byte {start}") from None
        return result

    def string(self):
        return self.strings(1)[0]

    def number(self, kind):
        return self.array(kind, 1)[0].item()

    def value(self):
        """One typed metadata value: a number, a bool, a string, or a flat array of one of these."""
        kind = self.number(4)
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number(4), self.number(10)
            return self.strings(count) if kind == STRING else self.array(kind, count)
        return self.number(kind)


class GGUFFile:
    """A GGUF file, checked. `metadata`: {key: value}; `tensors`: {GGUF name: (shape, type, offset in the file)}."""

    def __init__(self, path):
        self.path, size = path, os.path.getsize(path)
        with open(path, "rb") as f:
            header = Header(f.read(HEADER_LIMIT))
        if header.data[:4] != b"GGUF":
            raise ValueError("it is not a GGUF file (its first four bytes are not GGUF)")
        header.skip(4)
        version = header.number(4)
        if version not in (2, 3):
            raise ValueError(f"its GGUF version is {version}; supported are 2 and 3, little-endian")
        n_tensors, n_entries = header.number(10), header.number(10)
        if max(n_tensors, n_entries) > COUNT_LIMIT:
            raise ValueError(f"its header claims {n_tensors} tensors and {n_entries} metadata entries")
        self.metadata = {header.string(): header.value() for _ in range(n_entries)}

        records = {}
        for _ in range(n_tensors):
            name, n_dims = header.string(), header.number(4)
            if name in records or not 1 <= n_dims <= 4:
                raise ValueError(f"tensor {name[:80]!r} appears twice or has {n_dims} dimensions")
            shape = tuple(header.array(10, n_dims).tolist()[::-1])  # stored innermost first
            records[name] = shape, header.number(4), header.number(10)

        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = end = -(-header.at // alignment) * alignment
        self.tensors = {}
        for name, (shape, kind, offset) in records.items():
            try:
                quant = GGMLQuantizationType(kind)
                block, block_bytes = GGML_QUANT_SIZES[quant]
                dequantize(np.zeros((1, block_bytes), np.uint8), quant)
            except (ValueError, NotImplementedError):
                raise ValueError(f"tensor {name} has type {kind}, which is not supported; use another one") from None
            n_bytes = math.prod(shape) // block * block_bytes
            if shape[-1] % block or start + offset + n_bytes > size:
                raise ValueError(f"tensor {name}, {quant.name} {list(shape)} at byte {start + offset}, does not fit "
                                 f"in the file's {size} bytes; the file is damaged or its download unfinished")
            if start + offset != end:  # anything else is a mistake in a type, a size or an offset: wrong weights
                raise ValueError(f"tensor {name} is at byte {start + offset}, but the one before it ends at {end}; "
                                 "the file is damaged")
            self.tensors[name] = shape, quant, end
            end += -(-n_bytes // alignment) * alignment
        if size > end:
            raise ValueError(f"its tensors end at byte {end}, but it has {size}; the file is damaged")

        self.arch = self.metadata.get("general.architecture")
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unsupported GGUF architecture {self.arch!r}; supported are {', '.join(ARCHITECTURES)}")
        self.names = {hf_name(name): name for name in self.tensors}
        if "token_embd.weight" not in self.tensors:
            raise ValueError("tensor token_embd.weight is missing")

    def config(self):
        """The metadata as a Hugging Face config.json dictionary; its values are not checked here."""
        def get(key, default=None):
            return self.metadata.get(f"{self.arch}.{key}", default)

        heads, rope_dim = get("attention.head_count"), get("rope.dimension_count")
        head_dim = get("attention.key_length", rope_dim)
        if rope_dim not in (head_dim, None):
            raise ValueError(f"it rotates {rope_dim} of {head_dim} dimensions of a head; only all is supported")
        ends = [self.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
        return {
            "model_type": self.arch,
            "architectures": [ARCHITECTURES[self.arch]],
            "vocab_size": self.tensors["token_embd.weight"][0][0],
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "rope_theta": get("rope.freq_base", 10000.0),
            "rope_scaling": self.rope_scaling(get),
            "attention_bias": self.arch == "llama" and "blk.0.attn_q.bias" in self.tensors,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": [i for i in ends if i is not None],
        }

    def rope_scaling(self, get):
        """How the rotary frequencies were stretched, as Hugging Face writes it; None if they were not.

        GGUF keeps Llama-3's stretching only as its result, one divisor per frequency. Every Llama-3 model has the same
        parameters but for the factor, and that is the divisor of the lowest frequency; so guess, and compare.
        """
        if "rope_freqs.weight" not in self.tensors:
            kind = get("rope.scaling.type", "none")
            return None if kind == "none" else {"rope_type": kind, "factor": get("rope.scaling.factor")}
        divisors = self.read("rope_freqs.weight").double().flatten()
        theta = get("rope.freq_base", 10000.0)
        factor = divisors[-1].item() if len(divisors) else 0.0
        if isinstance(theta, (int, float)) and theta > 0 and factor > 0:
            n = len(divisors)
            wavelengths = 2 * math.pi * float(theta) ** (torch.arange(n, dtype=torch.float64) / n)
            smooth = ((8192 / wavelengths - 1) / (4 - 1)).clamp(0, 1)  # 0: divided by factor, 1: left alone
            if torch.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
                return None if factor == 1 else {
                    "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192}
        raise ValueError("its rope_freqs.weight does not follow Llama-3's formula, the only one supported")

    def shapes(self):
        """{Hugging Face name: shape [out, in]} of every weight in the file."""
        return {hf: self.tensors[name][0] for hf, name in self.names.items() if name != "rope_freqs.weight"}

    def read(self, hf):
        """One weight by its Hugging Face name: float32 [out, in] on the CPU."""
        name = self.names[hf]
        shape, quant, offset = self.tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[quant]
        raw = np.fromfile(self.path, np.uint8, math.prod(shape) // block * block_bytes, offset=offset)
        heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(name.split(".")[-2])
        if self.arch == "llama" and heads:
            # llama.cpp rotates neighbouring pairs (2i, 2i+1) where Hugging Face rotates (i, i + head_dim/2), and
            # reorders the rows of q and k (a bias: its elements) to fit. Put them back, while they are still small.
            n_heads = self.metadata.get(f"llama.{heads}", self.metadata["llama.attention.head_count"])
            row = len(raw) // shape[0]  # bytes
            raw = raw.reshape(n_heads, -1, 2, row).swapaxes(1, 2)  # [heads, 2, head_dim/2, row]
        return to_float(shape, quant, raw)

    def tokenizer(self):
        """The vocabulary as a `tokenizers.Tokenizer`: byte-level BPE ("gpt2") or SentencePiece BPE ("llama")."""
        kind = self.metadata.get("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise ValueError(f"its tokenizer.ggml.model is {kind!r}; supported are 'gpt2' and 'llama'")
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        types = np.asarray(self.metadata.get("tokenizer.ggml.token_type", ()))
        if not isinstance(tokens, list) or types.shape != (len(tokens),) or types.dtype.kind not in "iu":
            raise ValueError("its tokenizer.ggml.tokens and tokenizer.ggml.token_type are missing or differ in length")
        if len(tokens) > (rows := self.tensors["token_embd.weight"][0][0]):
            raise ValueError(f"its vocabulary has {len(tokens)} tokens, but tensor token_embd.weight only {rows} rows")
        vocab = {token: i for i, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            raise ValueError("its vocabulary holds the same token twice")
        build = byte_level_bpe if kind == "gpt2" else sentencepiece_bpe
        tokenizer = build(self.metadata, tokens, types.tolist(), vocab)
        special, added = (types == CONTROL) | (types == UNKNOWN), types == USER_DEFINED
        tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False) for i in np.flatnonzero(special)])
        tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i in np.flatnonzero(added)])
        add_bos = kind == "llama" or self.metadata.get("tokenizer.ggml.pre") in LLAMA3  # where the file does not say
        if self.metadata.get("tokenizer.ggml.add_bos_token", add_bos):
            bos = self.special_token("bos")
            if bos is None:
                raise ValueError("its vocabulary has no token tokenizer.ggml.bos_token_id, which should begin a text")
            tokenizer.post_processor = processors.TemplateProcessing(  # by the name of "bos": its own could mean a text
                single=["bos", "$A"], special_tokens=[{"id": "bos", "ids": [vocab[bos]], "tokens": [bos]}])
        return tokenizer

    def special_token(self, role):
        """The text of the "bos", "eos", "unknown" or "padding" token; None if the file names none."""
        tokens, i = self.metadata["tokenizer.ggml.tokens"], self.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else None


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; an unknown name stays as it is."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
        if match[2] in BLOCK_NAMES:
            return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{kind}"
    return f"{NAMES[module]}.{kind}" if module in NAMES else name


def to_float(shape, quant, raw):
    """Quantized blocks (uint8, any shape) -> float32 tensor of the given shape."""
    result = np.empty(math.prod(shape), np.float32)
    block, block_bytes = GGML_QUANT_SIZES[quant]
    raw = raw.reshape(-1, block_bytes)  # [blocks, bytes a block]
    step = CHUNK // block
    with np.errstate(invalid="ignore", over="ignore"):  # whoever uses the weights refuses infinite or NaN ones
        for i in range(0, len(raw), step):
            result[i * block:(i + step) * block] = dequantize(raw[i:i + step].reshape(1, -1), quant)[0]
    return torch.from_numpy(result.reshape(shape))


# How text is cut into words before BPE, by tokenizer.ggml.pre.
GPT2, LLAMA3, QWEN2 = ("gpt-2", "default"), ("llama-bpe", "llama3", "llama-v3"), ("qwen2",)
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level_bpe(metadata, tokens, types, vocab):
    """GPT-2's kind: text as bytes, each byte written as a visible character, merged in a listed order."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in LLAMA3 + QWEN2)
    if pre in GPT2:
        cut = byte_level
    elif pre == "smollm":
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre in LLAMA3 + QWEN2:
        words = Regex(WORDS % (r"\p{N}{1,3}" if pre in LLAMA3 else r"\p{N}"))
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level])
    else:
        raise ValueError(f"its tokenizer.ggml.pre is {pre!r}; supported are {', '.join(GPT2 + LLAMA3 + QWEN2)}, smollm")
    merges = metadata.get("tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ")) for merge in merges] if isinstance(merges, list) else None
    if merges is None or any(len(pair) != 2 for pair in merges):
        raise ValueError("its tokenizer.ggml.merges is not a list of pairs of tokens")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3))
    if pre in QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(metadata, tokens, types, vocab):
    """Llama-2's kind: spaces written as "▁", the best-scoring merge first, unknown characters as byte tokens <0xNN>.

    The file lists scores and no merges, so every way to cut a piece into two pieces is a merge, at the piece's score.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),):
        raise ValueError("its tokenizer.ggml.scores is missing or not as long as its vocabulary")
    pieces = {token for token, kind in zip(tokens, types) if kind == NORMAL}
    if sum(map(len, pieces)) > 1 << 22 or max(map(len, pieces), default=0) > 256:
        raise ValueError("its vocabulary holds pieces of absurd length")
    merges = []
    for i in np.argsort(-scores, kind="stable"):
        piece = tokens[i]
        if piece in pieces:
            cuts = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
            merges += [(left, right) for left, right in cuts if left in pieces and right in pieces]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise ValueError(f"its tokenizer.ggml.unknown_token_id is {unknown!r}")
    tokenizer = Tokenizer(models.BPE(
        vocab=vocab, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer

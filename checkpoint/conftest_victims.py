"""Small checkpoints of every form, whose copies test_fuzz.py damages and puts to use."""



import json
import struct
import time

import gguf
import tokenizers
import torch
from safetensors.torch import save_file

from calibrations.thresholds import FORMAT, GRID, Calibration, CalibrationError, fingerprint
from checkpoint import CheckpointError, load, open_checkpoint
from checkpoint.config import parse_config
from checkpoint.conftest import CONFIG, weights, write_folder, write_gguf
from checkpoint.tokenizer import TextStream, TokenizerError
from cli import quantize_folder

TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}"
            "{% endfor %}")
SETTINGS = {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"},
                                 "chat_template": TEMPLATE},
            "generation_config": {"eos_token_id": [2, 7]}}


# ---- the sound checkpoints ---------------------------------------------------------------------

def byte_level():
    """A tokenizer whose text is bytes, with a few merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("a", "n")]
    tokens = alphabet + ["".join(m) for m in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer, tokens, merges


def make_folder(path):
    """Every float type there is."""
    tensors = weights()
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64) * 9
    for (name, tensor), dtype in zip(tensors.items(), dtypes):
        tensors[name] = tensor.to(dtype)
    return write_folder(path, tensors=tensors, **SETTINGS)


def make_shards(path):
    """Three files and an index; Qwen2, with biases; a tied head; the other kind of tokenizer."""
    config = {"num_hidden_layers": 3, "tie_word_embeddings": True, "model_type": "qwen2",
              "architectures": ["Qwen2ForCausalLM"]}
    config = CONFIG | config | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    tensors, index = list(weights(config).items()), {}
    write_folder(path, config, dict(tensors), byte_level()[0], **SETTINGS)
    (path / "model.safetensors").unlink()
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file(dict(tensors[i::3]), path / file)
        index |= {name: file for name, _ in tensors[i::3]}
    index = {"metadata": {"total_size": 1}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def make_int8(path):
    """A folder that quantize.py wrote."""
    quantize_folder.write_folder(open_checkpoint(make_folder(path.with_name("floats"))), path)
    return path


def make_int4(path):
    source = open_checkpoint(make_folder(path.with_name("floats")))
    quantize_folder.write_folder(source, path, "int4")
    return path


def make_gguf(path):
    """Floats, and a SentencePiece vocabulary."""
    path.mkdir()
    write_gguf(path / "m.gguf", **{"tokenizer.chat_template": TEMPLATE})
    return path / "m.gguf"


def make_gguf_q8(path):
    """Qwen2, quantized, with a byte-level vocabulary."""
    path.mkdir()
    _, tokens, merges = byte_level()
    config = CONFIG | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    write_gguf(path / "m.gguf", weights(config), "qwen2", gguf.GGMLQuantizationType.Q8_0, **{
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": None,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.chat_template": TEMPLATE})
    return path / "m.gguf"


def make_calibration(path):
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(CONFIG["num_hidden_layers"], 7, len(GRID), generator=generator).cumsum(-1)
    metadata = {"format": FORMAT, "fingerprint": fingerprint(parse_config(CONFIG)),
                "allocation": "fisher"}
    Calibration(table, table / 100, metadata).save(path / "calibration.safetensors")
    return path / "calibration.safetensors"


MAKERS = {"folder": make_folder, "shards": make_shards, "int8": make_int8,
          "int4": make_int4, "gguf": make_gguf,
          "gguf q8": make_gguf_q8,
          "calibration": make_calibration}


def numbers(network):
    """Every weight of a model, or the tables of a calibration, as a list of tensors."""
    if isinstance(network, Calibration):
        return [network.table, network.sparsities]
    owners = [(network, ("embedding", "norm")), (network.lm_head, ("w_t", "scale"))]
    owners += [(block, ("attn_norm", "mlp_norm")) for block in network.blocks]
    owners += [(linear, ("w_t", "scale", "bias")) for linear in network.linears()]
    return [tensor for owner, names in owners for name in names
            if (tensor := getattr(owner, name)) is not None]


class Victim:
    """A sound checkpoint or calibration: its files in memory, and a folder for damaged copies."""

    def __init__(self, make, folder):
        self.path = make(folder)
        self.folder = folder
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.headers = {name: header_end(folder / name) for name in self.files
                        if name.endswith((".safetensors", ".gguf"))}
        self.network = None if make is make_calibration else load(self.path)[0]
        self.numbers = self.read()

    def read(self):
        """The numbers in the folder as it is, every weight or threshold, each once put to use."""
        return numbers(use_calibration(self.path) if self.network is None
                       else use_checkpoint(self.path))

    def damage(self, changes):
        """Write {file name: bytes, or None for no such file}."""
        for name, data in changes.items():
            if data is None:
                (self.folder / name).unlink()
            else:
                (self.folder / name).write_bytes(data)

    def repair(self, changes):
        for name in changes:
            if name in self.files:
                (self.folder / name).write_bytes(self.files[name])
            else:
                (self.folder / name).unlink(missing_ok=True)


def header_end(file):
    """Where the weights begin in a safetensors or GGUF file."""
    if file.suffix == ".gguf":
        return gguf.GGUFReader(file).data_offset
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


# ---- use

SECONDS = 5


def refusal(function, *kinds):
    """function() -> (its result, None), or (None, the sentence with which it refused)."""
    start, result, message = time.process_time(), None, None
    try:
        result = function()
    except (CheckpointError, TokenizerError, CalibrationError) as error:
        assert type(error) in kinds, error
        message = str(error)
        assert message.isprintable() and 20 < len(message) < 1000, message
        assert " ()" not in message, message
        assert "memory" not in message or "chat template" in message, message
    assert time.process_time() - start < SECONDS
    return result, message


def use_checkpoint(path):
    """Load a checkpoint, turn text into tokens and back; returns its Model."""
    network, tokenizer = load(path)

    def text():
        ids = tokenizer.encode("The wörd and 3 in\n\t 日本 <s>")
        ids += range(network.config.vocab_size + 2)
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
        assert all(0 <= i < network.config.vocab_size for i in tokenizer.eos_ids)

    refusal(text, TokenizerError)
    return network


def use_calibration(path):
    calibration = Calibration.load(path, parse_config(CONFIG))
    assert calibration.thresholds(0.5).isfinite().all()
    assert calibration.expected(0.95).isfinite().all()
    return calibration

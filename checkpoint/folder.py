"""Opens a Hugging Face folder: config.json, *.safetensors, tokenizer.json.

A safetensors file is a JSON header (names, dtypes, shapes, places), then plain numbers. The
safetensors package checks that the places cover the file exactly. Here they are compared with
what config.json asks for.
"""

import json
import re

import tokenizers
import torch
from safetensors import safe_open

from checkpoint.config import parse_config, text_part
from checkpoint.files import one_line
from checkpoint.opened import Checkpoint, CheckpointError, blame
from checkpoint.tensors import METHODS, VERSION, check_shapes, is_quantized
from checkpoint.tokenizer import Tokenizer, guard
from checkpoint.unify import unify

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PICKLES = ("is a pickle, which can run code when loaded and is never read; convert it to "
              "safetensors with transformers' save_pretrained")
FLOATS = ("F64", "F32", "F16", "BF16")
TEXT_LIMIT = 24 << 20  # bytes; the largest tokenizer.json known here, Llama-3's, takes 17 MB
HEADER_LIMIT = 4 << 20  # bytes of a safetensors header; one tensor takes about 130


def open_folder(folder):
    """A folder (Path) -> Checkpoint. Raises CheckpointError."""
    config_file = folder / "config.json"
    config_json = text_part(read_json(config_file))
    with blame(config_file):
        config = parse_config(config_json)
        quantized = parse_quantization(config_json.get("quantization_config"))

    shards = weight_files(folder)
    found = {}  # tensor name -> its shard, shape and dtype
    for shard in shards:
        for name, shape, dtype in read_header(shard):
            if name in found:
                raise CheckpointError(f"{shard} holds tensor {name[:100]!r}, which another shard "
                                      "holds too")
            found[name] = shard, shape, dtype

    def read(name, part=...):
        # An open file keeps every page that was read in this process's memory, so open it anew.
        with safe_open(found[name][0], framework="pt") as f:
            return f.get_slice(name)[part]

    with blame(folder):
        for name, (_, shape, dtype) in found.items():
            check_dtype(name, shape, dtype, quantized)
        stored = {name: shape for name, (_, shape, _) in found.items()}
        if not quantized:  # quantize.py writes what `unify` made
            stored, read = unify(config_json, config, stored, read)
        shapes = check_shapes(config, stored, quantized)
        if config.tie_embeddings and "lm_head.weight" in stored:  # harmless if it says the same
            if not torch.equal(read("lm_head.weight"), read("model.embed_tokens.weight")):
                raise ValueError("tensor lm_head.weight is not the embedding, though "
                                 "tie_word_embeddings in config.json says so; set it to false")
    tokenizer, files = open_tokenizer(folder, config_json, config.vocab_size)
    files = [config_file, *shards, *files]
    return Checkpoint(config, tokenizer, files, shapes, read, config_json, quantized, folder)


def parse_quantization(settings):
    """The quantization_config of a config.json -> "int8" or "int4" if quantize.py wrote it, else
    None. Raises ValueError if another version of quantize.py did."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        return None  # check_dtype refuses what others quantized
    version = settings.get("version", 1)
    if version != VERSION:
        raise ValueError(f"it names version {str(version)[:20]} of the format {method}, and this "
                         f"program reads version {VERSION}; write the folder anew with quantize.py")
    return METHODS[method]


def weight_files(folder):
    """The safetensors files of a folder: the single one, or those that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        for file in sorted(folder.iterdir()):
            if file.suffix in PICKLES:
                raise CheckpointError(f"{file} {NO_PICKLES}")
        raise CheckpointError(f"{folder} holds no {single.name} and no {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    plain = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
    for name in weight_map.values():  # a path could lead to any file of this machine
        if not isinstance(name, str) or not plain.fullmatch(name):
            raise CheckpointError(f"{index} names the file {str(name)[:100]!r}; expected a "
                                  ".safetensors file in the same folder")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, though {index.name} names it; download "
                                  "it again")
    return shards


def read_header(shard):
    """[(tensor name, shape, dtype)] of one safetensors file, checked."""
    with blame(shard):
        with open(shard, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
        if length > HEADER_LIMIT:
            raise ValueError(f"its header claims {length} bytes; at most {HEADER_LIMIT} are read")
        with safe_open(shard, framework="pt") as f:
            slices = [(name, f.get_slice(name)) for name in f.keys()]
            return [(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices]


def check_dtype(name, shape, dtype, quantized):
    """Raise ValueError if a tensor is stored in a dtype that it should not have."""
    if quantized and is_quantized(name):
        wanted = "I8" if len(shape) == 2 else "U8"  # see `tensor_shapes`
        if dtype != wanted:
            raise ValueError(f"tensor {name} is stored as {dtype}, though the config promises "
                             f"{wanted}; write the folder anew with quantize.py")
    elif dtype not in FLOATS:
        raise ValueError(f"tensor {name} is stored as {dtype}; supported are "
                         f"{', '.join(FLOATS)}, so use the unquantized checkpoint")


def open_tokenizer(folder, config_json, vocab_size):
    """The Tokenizer of a folder, and the files that it was made from."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; make it with transformers: "
                              "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    names = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    optional = [folder / name for name in names if (folder / name).is_file()]
    settings, generation = (read_json(folder / name) if folder / name in optional else {}
                            for name in names[:2])

    special = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(role)
        special[role] = token.get("content") if isinstance(token, dict) else token
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        template = {str(entry.get("name")): entry.get("template") for entry in template
                    if isinstance(entry, dict)}.get("default")
    if folder / names[2] in optional:
        template = read_text(folder / names[2]).decode("utf-8", "replace")
    eos = [config_json.get("eos_token_id"), generation.get("eos_token_id")]
    text = read_text(file)
    with blame(file):
        tokenizer = guard("not a sound tokenizer", tokenizers.Tokenizer.from_buffer, text)
        tokenizer = Tokenizer(tokenizer, vocab_size, special, eos, template, generation)
        return tokenizer, [file, *optional]


def read_text(file):
    """The bytes of a text file. Raises CheckpointError if it is far larger than any real one."""
    if (size := file.stat().st_size) > TEXT_LIMIT:
        raise CheckpointError(f"{file} is {size} bytes; at most {TEXT_LIMIT} are read")
    return file.read_bytes()


def read_json(file):
    """A file that holds one JSON object -> dict."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; a Hugging Face folder has one")
    text = read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}; expected an object")
    return value

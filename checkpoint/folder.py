"""Opens a Hugging Face folder: config.json, *.safetensors, tokenizer.json.

A safetensors file is a JSON header (names, dtypes, shapes, places), then plain numbers. The
safetensors package checks that the places cover the file exactly. Here they are compared with
what config.json asks for.
"""

import fnmatch
import re

import torch
from safetensors import safe_open

from checkpoint.config import parse_config, text_part
from checkpoint.files import one_line
from checkpoint.folder_tokenizer import json_object, open_folder_tokenizer
from checkpoint.opened import Checkpoint, CheckpointError, blame, refuse_stand_in
from checkpoint.tensors import METHODS, VERSION, check_shapes, is_quantized
from checkpoint.unify import unify

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PICKLES = ("is a pickle, which can run code when loaded and is never read; convert it to "
              "safetensors with transformers' save_pretrained")
FOREIGN = ("quantized the weights, which is not read here; use the original checkpoint, or a "
           ".gguf file of it")
METHOD_OF = {  # the end of a tensor's name -> what made it
    **dict.fromkeys(("qweight", "qzeros", "g_idx"), "AWQ or GPTQ"),
    **dict.fromkeys(("absmax", "quant_map", "SCB"), "bitsandbytes"),
    **dict.fromkeys(("weight_scale_inv", "input_scale"), "fp8"),
    "weight_scale": "rounding to 8 bits (config.json does not say whose)",
    "weight_packed": "compressed-tensors", "scales": "MLX or GPTQ", "W_q": "HQQ"}
FLOATS = ("F64", "F32", "F16", "BF16")
HEADER_LIMIT = 4 << 20  # bytes of a safetensors header; one tensor takes about 130


def open_folder(folder):
    """A folder (Path) -> Checkpoint. Raises CheckpointError."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{config_file} is missing; {other_contents(folder)}")
    config_json = text_part(json_object(config_file))
    with blame(config_file):
        config = parse_config(config_json)
        quantized = parse_quantization(config_json)

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
        for name, (_, _, dtype) in found.items():
            method = "fp8" if dtype.startswith("F8") else METHOD_OF.get(name.rpartition(".")[2])
            if method and not quantized:
                raise ValueError(f"tensor {name[:100]} shows that {method} {FOREIGN}")
        for name, (_, shape, dtype) in found.items():
            check_dtype(name, shape, dtype, quantized)
        stored = {name: shape for name, (_, shape, _) in found.items()}
        origins = {name: name for name in stored}
        if not quantized:  # quantize.py writes what `unify` made
            stored, read, origins = unify(config_json, config, stored, read)
        shapes = check_shapes(config, stored, quantized)
        if config.tie_embeddings and "lm_head.weight" in stored:  # harmless if it says the same
            if not torch.equal(read("lm_head.weight"), read("model.embed_tokens.weight")):
                raise ValueError("tensor lm_head.weight is not the embedding, though "
                                 "tie_word_embeddings in config.json says so; set it to false")
    tokenizer, files = open_folder_tokenizer(folder, config_json, config.vocab_size)
    files = [config_file, *shards, *files]
    sources = {name: found[origins[name]][0] for name in shapes}
    return Checkpoint(config, tokenizer, files, shapes, read, sources, config_json, quantized,
                      folder)


def parse_quantization(config):
    """The dictionary of a config.json -> "int8" or "int4" if quantize.py wrote it, else None.

    Raises ValueError if another version of it did, or another program quantized the weights.
    """
    settings = [config.get(f"{key}_config") for key in ("quantization", "compression")]
    settings = next(filter(None, [*settings, config.get("quantization")]), None)  # the last: MLX
    if not isinstance(settings, dict):
        return None
    bits = any(key.startswith(("load_in_", "bnb_")) for key in settings)
    method = settings.get("quant_method", "bitsandbytes" if bits else "an unknown method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"it says that {str(method)[:40]} {FOREIGN}")
    version = settings.get("version", 1)
    if version != VERSION:
        raise ValueError(f"it names version {str(version)[:20]} of the format {method}, and this "
                         f"program reads version {VERSION}; write the folder anew with quantize.py")
    return METHODS[method]


OTHERS = {  # patterns of files -> what a folder without a model that can be read is, what to do
    "snapshots": "it is the hub's cache; give the folder in snapshots, or the hub id",
    "*.gguf": "the folder holds {}; give that file",
    "model-*.safetensors": ("the folder holds {}, but no model.safetensors.index.json, which says "
                            "what is in which file; download it, too"),
    **dict.fromkeys(("consolidated*", "params.json"), (
        "the folder holds a model in the format of its makers' own program; download the Hugging "
        "Face version, or convert it with transformers")),
    **dict.fromkeys((*(f"*{suffix}" for suffix in PICKLES), "pytorch_model.bin.index.json"),
                    "{} " + NO_PICKLES),
    "model_index.json": "the folder holds a pipeline that makes images; give one of its language "
                        "models",
    **dict.fromkeys(("*.h5", "*.msgpack", "*.onnx", "*.incomplete", "*.safetensors"), (
        "the folder holds {}, which is not read; download the model's safetensors files, under "
        "their names"))}


def other_contents(folder):
    """What a folder holds instead of a model, and what to do: the end of a sentence."""
    names = sorted({path.name for path in folder.iterdir()} - {"model.safetensors"})
    if "adapter_config.json" in names:
        base = json_object(folder / "adapter_config.json").get("base_model_name_or_path")
        return (f"the folder holds a LoRA adapter of {one_line(base)}; merge it into that model "
                "with peft's merge_and_unload, and give the folder that save_pretrained writes")
    for pattern, what in OTHERS.items():
        for name in names:
            if fnmatch.fnmatch(name.lower(), pattern):
                return what.format(name)
    return "a Hugging Face folder has one"


def weight_files(folder):
    """The safetensors files of a folder: the single one, or those that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{folder} holds no {single.name} and no {index.name}; "
                              f"{other_contents(folder)}")
    weight_map = json_object(index).get("weight_map")
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
            start = f.read(32)
        refuse_stand_in(shard, start)
        if start.startswith(b"GGUF"):
            raise ValueError("it is a GGUF file; name it so, and give it instead of the folder")
        length = int.from_bytes(start[:8], "little")
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

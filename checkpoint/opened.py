"""What opening a checkpoint gives, whatever its form, and the one error that it raises."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoint.files import one_line
from checkpoint.tokenizer import Tokenizer
from model import Config
from tensor_parallel import cut


class CheckpointError(ValueError):
    """One sentence: which file, what is wrong with it, and what to do if anything helps."""


@dataclass
class Checkpoint:
    """A checkpoint whose files are checked. No weight is read yet."""

    config: Config
    tokenizer: Tokenizer
    files: list[Path]  # all that it consists of
    shapes: dict[str, tuple]  # Hugging Face tensor name -> shape, exactly those the model needs
    read: Callable[..., torch.Tensor]  # name, slices -> tensor on the CPU
    config_json: dict  # what `config` was made from
    quantized: str | None = None  # "int8" or "int4" if quantize.py wrote it
    folder: Path | None = None  # with config.json; None for a single file
    few_bits: bool = False  # its matrices have 8 bits or fewer, in blocks of a GGUF file

    @property
    def tensors(self):
        """Every (name, tensor), each read when it is asked for; this rank's slice of it."""
        return ((name, self.read(name, cut(name, shape))) for name, shape in self.shapes.items())


@contextlib.contextmanager
def blame(path):
    """Turn an error about a file's or folder's content into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None

"""What opening a checkpoint gives, whatever its form, and the one error that it raises."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoint.files import one_line
from checkpoint.tokenizer import Tokenizer
from cpu.packed import Groups
from model import Config


class CheckpointError(ValueError):
    """One sentence: which file, what is wrong with it, and what to do if anything helps."""


@dataclass
class Checkpoint:
    """A checkpoint whose files are checked. No weight is read yet."""

    config: Config
    tokenizer: Tokenizer
    files: list[Path]  # all that it consists of
    shapes: dict[str, tuple]  # Hugging Face tensor name -> shape, exactly those the model needs
    read: Callable[..., torch.Tensor]  # name, slices (default: all) -> tensor on the CPU
    sources: dict[str, Path]  # a tensor's name -> the file that holds it
    config_json: dict  # what `config` was made from
    quantized: str | None = None  # "int8" or "int4" if quantize.py wrote it
    folder: Path | None = None  # with config.json; None for a single file
    few_bits: bool = False  # its matrices have 8 bits or fewer, in blocks of a GGUF file
    # name of a matrix -> its cpu.packed.Groups; None where some matrix has none
    groups: Callable[..., Groups] | None = None

    @property
    def tensors(self):
        """Every (name, tensor), each read when it is asked for."""
        for name in self.shapes:
            with self.blame_for(name):
                tensor = self.read(name)
            yield name, tensor

    def blame_for(self, name):
        """`blame`, for the file that holds this tensor."""
        return blame(self.sources[name])


@contextlib.contextmanager
def blame(path):
    """Turn an error about a file's or folder's content into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None


STAND_INS = {  # how a file begins that is something else than it looks -> what it is, what to do
    **dict.fromkeys((b"<!doctype html", b"<html", b"<?xml"), (
        "a web page, perhaps of a failed download; download the file itself")),
    b"version https://git-lfs": ("a Git LFS pointer, a note that stands for the file; fetch the "
                                 "file itself with git lfs pull, or download it anew"),
    **dict.fromkeys((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zxz", b"bzh", b"7z\xbc", b"rar!"), (
        "packed; unpack it first")),
    **dict.fromkeys((b"tjgg", b"fmgg", b"lmgg"), (
        "in a format that llama.cpp had before GGUF; download a .gguf file of the model"))}


def refuse_stand_in(file, start):
    """Raise CheckpointError if a file, which starts with these bytes, only stands for another."""
    start = start[:64].removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n\t").lower()
    for begin, what in STAND_INS.items():
        if start.startswith(begin):
            raise CheckpointError(f"{file} is {what}")

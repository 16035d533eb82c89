"""What all scripts share: the parser, the flags that choose a model, errors and exit codes.

A script ends in one of four ways: 0 when it is done; 2 after one sentence on standard error that
says what is wrong and what to do; 130 after Ctrl-C, silently; 0, silently, when the reader of its
output has left.
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path

import torch

from calibrations.thresholds import ALLOCATIONS
from checkpoint import load, open_checkpoint
from checkpoint.files import one_line
from checkpoint.memory import free_memory
from cpu.compiler import has_library
from model import SITES
from quantize import can_be_int4
from tensor_parallel import rank, ranks, require_one_process, start, stop, world_size


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(doc):
    """A parser for a script with this docstring: its first paragraph is the description, its last
    one the examples."""
    layout = functools.partial(
        argparse.RawDescriptionHelpFormatter, max_help_position=30, width=98)
    return Parser(prog=script_name(), description=doc.split("\n\n")[0],
                  epilog="examples:\n" + doc.rpartition("\n\n")[2], formatter_class=layout)


def script_name():
    """The name of the running script, such as generate.py."""
    return Path(sys.argv[0]).name


def between(kind, low, high):
    """An argparse type: an int or a float (`kind`) from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # "not", so that NaN is refused
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {whole}number from {low} to {high}")
        return value
    return parse


COUNT, SHARE = between(int, 1, 2**31 - 1), between(float, 0, 0.95)


# ---- flags of several scripts ------------------------------------------------------------------

def add_model_flag(parser):
    """Add --model in a group of its own; returns the group's add_argument, for more flags."""
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="M",
        help="Hugging Face folder, hub id or .gguf file (default: SmolLM2-135M-Instruct)")
    return add


def add_model_flags(parser, dtype="float32", quantize=None):
    """Add --model, --dtype and --quantize (with these defaults), and --device.

    quantize: None, or "auto", which `load_model` explains; args.dtype is then None if not given
    Returns the group's add_argument, for more flags.
    """
    kinds, default = ("int8", "int4"), ""
    if quantize == "auto":
        kinds = ("auto", *kinds, "none")
        default = ("; auto, the default: GGUF files of 8 bits or fewer run on a CPU as they are "
                   "or as int8, unless --dtype is given; else none")
    add = add_model_flag(parser)
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        default=None if quantize == "auto" else dtype,
        help=f"of weights and arithmetic (default: {dtype})")
    add("--quantize", choices=kinds, default=quantize,
        help="int8: half the bytes of bfloat16; int4: a third, less exact" + default)
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    return add


def add_sparsities(add, default):
    """Add --sparsity, a list."""
    add("--sparsity", type=SHARE, nargs="+", metavar="S", default=default,
        help="0 to 0.95; 0 is dense (default: %(default)s)")


def add_calibrations(add):
    """Add --calibration and --allocation, for `evaluate.settings`."""
    add("--calibration", metavar="FILE", nargs="+", default=[],
        help="files of calibrate.py, one per allocation (default: those available for this model)")
    add("--allocation", nargs="+", choices=ALLOCATIONS, help="which of them (default: all)")


def add_json(add):
    """Add --json, the file of `cli/results.py`."""
    add("--json", metavar="FILE",
        help="add the results to this file; measuring the same again replaces its results")


def device(text):
    """An argparse type: the name of a device, if this machine has it."""
    try:
        usable = torch.device(text).type in ("cpu", "cuda")
        torch.empty(0, device=text)  # "cuda:1" is a valid name, but is there such a card?
    except (RuntimeError, AssertionError):  # the latter from a PyTorch without CUDA
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"device {text!r} is not available; try --device cpu")
    if text.startswith("cuda:"):
        torch.cuda.set_device(text)  # Triton launches kernels on the current device
    return text


def load_model(args, context=None, alone=None):
    """Load what the flags of `add_model_flags` name -> (Model, Tokenizer).

    context: the longest text, in tokens; None for the model's own limit
    alone: what the script does if torchrun must not start it, such as "calibrating"
    With --quantize auto, a GGUF file of 8 bits or fewer runs on a CPU as it is (or else as int8),
    which decodes faster, unless the user named a dtype. args.quantize and args.dtype then say what
    came of it. Standard error says what int4 does not cover.
    Raises ValueError (often CheckpointError) and OSError. Under torchrun, the ranks meet here.
    """
    if alone is not None:
        require_one_process(alone)
    args.device = start(args.device)
    checkpoint, named = args.model, args.dtype
    args.dtype = named or "bfloat16"
    if args.quantize == "auto":
        checkpoint, args.quantize = open_checkpoint(args.model), None
        if checkpoint.few_bits and args.device == "cpu" and named is None:
            as_it_is = checkpoint.groups and world_size() == 1 and has_library()
            args.quantize = "gguf" if as_it_is else "int8"
            as_what = "they are" if as_it_is else "int8"
            print(f"the file's weights of 8 bits or fewer run as {as_what}, faster than "
                  f"{args.dtype}; --quantize none switches that off", file=sys.stderr)
    elif args.quantize == "none":
        args.quantize = None
    model, tokenizer = load(checkpoint, dtype=getattr(torch, args.dtype), device=args.device,
                            quantize=args.quantize, context=context, ranks=ranks())
    kinds = {type(linear) for linear in model.linears()}
    if args.quantize == "int4" or len(kinds) == 2:  # int4, and int8 where that is impossible
        tell_int8(model.config)
    return model, tokenizer


def tell_int8(config):
    """Print which projections of an int4 model remain int8, if any."""
    left = [name for site, names in SITES.items() for name in names
            if not can_be_int4(site, config.linear_shape(site)[1])]
    if left:
        print(f"{', '.join(left)} are int8: int4 needs columns in multiples of 32",
              file=sys.stderr)


# ---- errors and exit codes ---------------------------------------------------------------------

def run_script(main):
    """Run main() and end the process as a command-line tool should (see the top of this file)."""
    # What standard output's encoding lacks becomes "?"; input may have the line ends of Windows.
    for stream, options in (sys.stdout, {"errors": "replace"}), (sys.stdin, {"newline": None}):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(**options)
    try:
        main()
        stop()
        if sys.stdout is not None:  # it is None if the caller closed it
            sys.stdout.flush()  # a full disk shows here at the latest
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        drop_output()
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # the disk is full: `message` says so
            drop_output()
        fail(message)


def drop_output():
    """Python flushes standard output once more at exit: give it a place that takes anything."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error):
    """One sentence that explains an exception to a person; None if it is a bug."""
    if isinstance(error, ImportError):
        return f"{one_line(error)}; run pip install -r tests/requirements.txt"
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    if on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        free = free_memory(torch.device("cuda" if on_gpu else "cpu")) / 1e9
        return (f"out of memory, with {free:.1f} GB free now ({one_line(error)}); try --dtype "
                "bfloat16, --quantize int8, a shorter text (--context) or a smaller model")
    return None


def fail(message):
    """Exit with code 2 after one line on standard error."""
    where = f" on rank {rank()}" if rank() > 0 else ""
    if rank() > 0:
        time.sleep(3)  # torchrun ends this rank first if rank 0 reports the same error
    print(f"{script_name()}: error{where}: {message}", file=sys.__stderr__, flush=True)
    if world_size() > 1:
        os._exit(2)  # at once: a clean shutdown could wait for ranks that never answer
    sys.exit(2)

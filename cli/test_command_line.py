"""Tests of what all scripts share: numbers, flags, and how a script ends."""

import argparse
import functools
import io
import itertools
import os
import subprocess
import sys

import pytest
import torch

from checkpoint.files import read_input
from cli import command_line
from cli.command_line import add_model_flags, between, load_model, make_parser, run_script
from conftest import HERE, start

DOC = "What it does.\n\nWhy.\n\n    python script.py --model M"


@pytest.fixture
def ends(run):
    """A function: how a script called script.py ends."""
    return functools.partial(run, name="/some/where/script.py")


def test_numbers():
    assert between(int, 1, 5)("5") == 5 and between(float, 0, 0.95)("0.5") == 0.5
    for kind, low, high, text, words in (
            (int, 1, 5, "6", "'6' is not a whole number from 1 to 5"),
            (int, 1, 5, "2.0", "'2.0' is not a whole number from 1 to 5"),
            (float, 0, 1, "nan", "'nan' is not a number from 0 to 1"),
            (float, 0, 1, "-0.1", "'-0.1' is not a number from 0 to 1"),
            (float, 0, 1, "x", "'x' is not a number from 0 to 1")):
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            between(kind, low, high)(text)


def parse():
    parser = make_parser(DOC)
    add = add_model_flags(parser, dtype="bfloat16")
    add("--more", action="store_true")
    print(parser.parse_args())


def test_help_and_flags(ends):
    code, out, err = ends(parse, "--help")
    assert code == 0 and err == "" and "usage: script.py" in out and "What it does." in out
    assert "Why" not in out and "examples:\n    python script.py --model M" in out
    for flag in ("--model", "--dtype", "--quantize", "--device", "--more"):
        assert flag in out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert ends(parse)[1] == str(argparse.Namespace(
        model=None, dtype="bfloat16", quantize=None, device=device, more=False)) + "\n"
    for words, arguments in (
            ("device 'abacus' is not available; try --device cpu", ("--device", "abacus")),
            ("device 'cuda:99' is not available; try --device cpu", ("--device", "cuda:99")),
            ("device 'meta' is not available; try --device cpu", ("--device", "meta")),
            ("invalid choice: 'int3'", ("--dtype", "int3")),
            ("unrecognized arguments: --les", ("--les",))):
        code, out, err = ends(parse, *arguments)
        assert code == 2 and out == "" and words in err, err
        assert err.startswith("script.py: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["generate", "benchmark"])
@pytest.mark.parametrize("given", [None, "7"])
def test_how_long_threads_spin(name, given):
    """Set before PyTorch starts OpenMP; what the user has set stays."""
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    program = (f"import builtins, os, sys; real = __import__\n"
               "def watch(name, *rest):\n"
               "    if name == 'torch' and 'torch' not in sys.modules:\n"
               "        print(os.environ.get('GOMP_SPINCOUNT')); sys.exit()\n"
               "    return real(name, *rest)\n"
               f"builtins.__import__ = watch; import {name}")
    if given:
        environment["GOMP_SPINCOUNT"] = given
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, env=environment,
                          capture_output=True, text=True)
    assert done.stdout.strip() == (given or "2000"), done.stderr


@pytest.mark.parametrize("few_bits, groups, ranks, dtype, asked, loaded", [
    (True, True, 1, None, "auto", "gguf"), (True, True, 2, None, "auto", "int8"),
    (True, None, 1, None, "auto", "int8"), (True, True, 1, "float32", "auto", None),
    (True, True, 1, None, "none", None), (True, True, 1, None, "int8", "int8"),
    (False, None, 1, None, "auto", None)])
def test_few_bits_stay_where_one_cpu_multiplies_them(
        monkeypatch, capsys, few_bits, groups, ranks, dtype, asked, loaded):
    """Several ranks would cut groups; what the user names wins."""
    opened, options = argparse.Namespace(few_bits=few_bits, groups=groups), {}
    monkeypatch.setattr(command_line, "open_checkpoint", lambda _: opened)
    monkeypatch.setattr(command_line, "world_size", lambda: ranks)
    monkeypatch.setattr(command_line, "load", lambda _, **given: options.update(given) or (
        argparse.Namespace(linears=list), None))
    load_model(argparse.Namespace(model=None, dtype=dtype, device="cpu", quantize=asked))
    assert options["quantize"] == loaded
    assert options["dtype"] == (torch.float32 if dtype else torch.bfloat16)
    told = "bits or fewer run as" in capsys.readouterr().err
    assert told == (asked == "auto" and loaded is not None)


def raising(error):
    def main():
        raise error
    return main


def test_endings(ends):
    assert ends(lambda: print("done")) == (0, "done\n", "")
    assert ends(raising(KeyboardInterrupt())) == (130, "", "")
    for error in (ValueError("the text is empty"), OSError("the text is empty")):
        assert ends(raising(error)) == (2, "", "script.py: error: the text is empty\n")
    code, _, err = ends(raising(ModuleNotFoundError("No module named 'matplotlib'")))
    assert code == 2 and err.count("\n") == 1 and "'matplotlib'; run pip install" in err
    with pytest.raises(RuntimeError, match="a bug"):  # which nobody should hide
        ends(raising(RuntimeError("a bug")))


def test_out_of_memory_is_one_sentence(ends, monkeypatch):
    for main in (lambda: torch.empty(1 << 55), raising(MemoryError())):
        code, _, err = ends(main)
        assert code == 2 and err.count("\n") == 1 and "out of memory, with" in err
        assert "GB free" in err and "--quantize int8" in err
    # the memory told is that of the device that is full
    free = {"cuda": 1e9, "cpu": 2e9}
    monkeypatch.setattr("cli.command_line.free_memory", lambda device: free[device.type])
    for error, words in (torch.OutOfMemoryError("no"), "1.0 GB"), (MemoryError(), "2.0 GB"):
        code, _, err = ends(raising(error))
        assert code == 2 and words in err


def endless():
    for i in itertools.count():
        print(i)


def test_a_reader_that_leaves(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    process = start(endless, streams=["/dev/null", tmp_path / "pipe", tmp_path / "err"])
    with open(tmp_path / "pipe") as pipe:
        pipe.read(1)
    process.join(60)
    assert process.exitcode == 0 and (tmp_path / "err").read_text() == ""


def test_a_full_disk(tmp_path):
    process = start(parse, streams=["/dev/null", "/dev/full", tmp_path / "err"])
    process.join(60)
    told = (tmp_path / "err").read_text()
    assert process.exitcode == 2 and told.count("\n") == 1 and "No space left" in told


@pytest.mark.parametrize("encoding, answer", [("utf-8", "日 é\nx\nA"), ("latin-1", "? é\nx\nA"),
                                              ("ascii", "? ?\nx\nA")])
def test_streams_of_any_encoding(encoding, answer, monkeypatch):
    """What standard output lacks is replaced; a byte order mark and CRLF are no text."""
    errors, out = "surrogateescape" if encoding == "ascii" else "strict", io.BytesIO()
    for name, stream in ("stdin", io.BytesIO(b"\xef\xbb\xbfx\r\nA")), ("stdout", out):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding, errors, newline="\n"))
    run_script(lambda: print("日 é", read_input(sys.stdin.read), sep="\n"))
    expected = answer.replace("\nx", "\nï»¿x") if encoding == "latin-1" else answer
    assert out.getvalue().decode(encoding).rstrip("\n") == expected

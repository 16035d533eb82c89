"""Compiles step.c for this machine at its first use, and loads it.

The library is kept in the user's cache folder, under a name that holds a hash of everything that
it depends on: the source, the flags, the compiler and the processor. So another compiler, a new
version or a home that several machines share never loads somebody else's library. It is written
to a temporary file and renamed: two processes may compile it at once. Nothing but a C compiler is
needed. This file uses nothing else of the project.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-pthread")
# The instructions of this processor; "-mcpu" is the name on some ARM compilers.
TUNING = (("-march=native",), ("-mcpu=native",), ())
SOURCE = Path(__file__).with_name("step.c")
HOW = "install a C compiler (gcc or clang), or `pip install ziglang`"


class NoCompiler(Exception):
    """A sentence for the user: why there is no library, and what to do."""


def compiler():
    """The command of a C compiler, a list of words. Raises NoCompiler if there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise NoCompiler(f"there is no C compiler; {HOW}")


def run(command):
    """Run a command -> (whether it succeeded, what it printed)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout + done.stderr


def processor():
    """What "native" means to the compiler: the processor's name and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    facts = ("model name", "flags", "features", "cpu part")
    told = {line for line in lines if line.lower().startswith(facts)}
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *sorted(told)])


def build(command, source, library, flags=()):
    """Compile `source` to the file `library`, whole or not at all. Raises NoCompiler."""
    handle, part = tempfile.mkstemp(dir=library.parent, suffix=".tmp")
    os.close(handle)
    try:
        for tuning in TUNING:
            done, printed = run([*command, *FLAGS, *tuning, *flags, str(source), "-o", part, "-lm"])
            if done:
                os.replace(part, library)
                return
    finally:
        Path(part).unlink(missing_ok=True)
    reason = next((line for line in printed.splitlines() if "error" in line.lower()), printed)
    raise NoCompiler(f"`{shlex.join(command)}` cannot compile {source.name} ({reason.strip()}); "
                     f"{HOW}, and name it in the environment variable CC")


def cache_folder():
    """The folder of libraries, downloads and calibrations: nanoteal in $XDG_CACHE_HOME or
    ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanoteal"


def library(flags=()):
    """step.c as a ctypes.CDLL. Raises NoCompiler, with a sentence for the user.

    flags: more flags for the compiler, a tuple
    """
    found = load_once(SOURCE, cache_folder(), flags)
    if isinstance(found, NoCompiler):
        raise found
    return found


@functools.cache
def load_once(source, folder, flags):
    """What `load` returns or raises: what failed once would fail again, and slowly."""
    try:
        return load(source, folder, flags)
    except NoCompiler as error:
        return error


def load(source, folder, flags=()):
    """The library that `source` compiles to, a ctypes.CDLL.

    source: Path of the C file
    folder: Path of the folder that keeps the library; if it can't be written, nothing is kept
    Raises NoCompiler.
    """
    command = compiler()
    _, version = run([*command, "--version"])
    facts = [source.read_text(), version, processor(), *command, *FLAGS, *flags]
    name = f"{source.stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    with tempfile.TemporaryDirectory() as nowhere:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            library = folder / name
            if not library.exists():
                build(command, source, library, flags)
        except OSError:  # a full disk, or a cache that is read-only
            library = Path(nowhere) / name
            build(command, source, library, flags)
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise NoCompiler(f"the compiled {source.name} cannot be loaded ({error}); "
                             f"{HOW}, and name it in the environment variable CC") from error

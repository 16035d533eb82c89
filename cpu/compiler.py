"""Compiles step.c for this machine at its first use, and opens the library.

The library is kept in the user's cache folder, under a name that holds a hash of everything that
it depends on: the source, the flags, the compiler and the processor. So another compiler, a new
version or a home that several machines share never opens somebody else's library. It is compiled
in a temporary folder and moved: two processes may do that at once. Nothing but a C compiler is
needed, and nothing else of the project.
"""

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-pthread")
SOURCE = Path(__file__).with_name("step.c")
outcomes = {}  # what `library` returned or raised: what failed once would fail again, and slowly


class NoCompiler(Exception):
    """A sentence for the user: why there is no library, and what to do."""

    def __init__(self, reason):
        super().__init__(f"{reason}; install a C compiler (gcc or clang) or `pip install ziglang`, "
                         "or name one in the environment variable CC")


def library(flags=(), source=SOURCE):
    """step.c, or another source, as a ctypes.CDLL. Raises NoCompiler.

    flags: more flags for the compiler, a tuple
    """
    key = source, flags, cache_folder()
    if key not in outcomes:
        try:
            outcomes[key] = open_library(*key)
        except NoCompiler as error:
            outcomes[key] = error
    if isinstance(outcomes[key], NoCompiler):
        raise outcomes[key]
    return outcomes[key]


def has_library():
    """Whether `library` returns one."""
    try:
        library()
    except NoCompiler:
        return False
    return True


def cache_folder():
    """The folder of libraries, downloads and calibrations: nanoteal in $XDG_CACHE_HOME or
    ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanoteal"


def open_library(source, flags, folder):
    """As `library`, compiled into the folder, if need be; if that can't be written, not kept."""
    command = compiler()
    # All macros: they tell the compiler's version and the processor's features.
    _, macros = run([*command, "-march=native", "-dM", "-E", "-x", "c", os.devnull])
    facts = [source.read_text(), macros, *command, *FLAGS, *flags]
    file = folder / f"{source.stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError:
        scratch = tempfile.TemporaryDirectory()
    with scratch as built:
        if not file.exists():
            built = Path(built) / file.name
            build(command, source, built, flags)
            try:
                os.replace(built, file)
            except OSError:
                file = built
        try:
            return ctypes.CDLL(str(file))
        except OSError as error:
            raise NoCompiler(f"the compiled {source.name} cannot be loaded ({error})") from error


def compiler():
    """The command of a C compiler, a list of words. Raises NoCompiler if there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise NoCompiler("there is no C compiler")


def run(command):
    """Run a command -> (whether it succeeded, what it printed)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout + done.stderr


def build(command, source, library, flags):
    """Compile `source` to the file `library`. Raises NoCompiler."""
    for tuning in (["-march=native"], []):  # the instructions of this processor, if it knows them
        done, printed = run([*command, *FLAGS, *tuning, *flags, str(source), "-o", str(library),
                             "-lm"])
        if done:
            return
    reason = next((line for line in printed.splitlines() if "error" in line.lower()), printed)
    raise NoCompiler(f"`{shlex.join(command)}` cannot compile {source.name} ({reason.strip()})")

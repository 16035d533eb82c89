"""What every script here does with files: the cache folder, writing whole or not at all, short
errors."""

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder():
    """The folder for downloads and calibrations of this machine: $XDG_CACHE_HOME or ~/.cache,
    /nanoteal."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanoteal"


@contextlib.contextmanager
def write_whole(path):
    """Yield a temporary path beside `path`, which takes its name when the block ends without an
    error.

    Makes the folder if need be. A reader sees the old file or the new one, never half of it.
    Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def one_line(error):
    """The first line of an error, at most 300 characters, printable: it may quote a stranger's
    file."""
    line = str(error).strip().partition("\n")[0][:300]
    return "".join(c if c.isprintable() else "\ufffd" for c in line)

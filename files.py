"""What every script does with files: the cache folder, whole files or none, short errors."""

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder():
    """This machine's downloads and calibrations: nanoteal in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanoteal"


@contextlib.contextmanager
def write_whole(path):
    """Yield a temporary path beside `path`, which takes its name if the block ends without error.

    Makes the folder if need be. A reader sees the old file or the new one, never half of one.
    Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def one_line(error):
    """An error's first 300 printable characters in a line: it may quote a stranger's file."""
    line = str(error).strip().partition("\n")[0][:300]
    return "".join(c if c.isprintable() else "\ufffd" for c in line)

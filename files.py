"""What every script does with files: cache, UTF-8, whole files or none, short errors."""

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


def require_writable(path, flag):
    """Raise ValueError if `write_whole` could not write to `path`, the value of `flag`.

    To be called before long work, whose results would be lost. It leaves nothing behind.
    """
    path = Path(path).absolute()
    try:
        folder = next(parent for parent in path.parents if parent.exists())
        with tempfile.TemporaryDirectory(dir=folder, prefix="."):
            reason = "it is a folder" if path.is_dir() else None
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ValueError(f"cannot write {path} ({reason}); name another file with {flag}")


def read_text(path):
    """The text of a UTF-8 file. Raises OSError, and ValueError for a file of another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or "
                         "name another file") from None


def read_input(read):
    """What read() takes from standard input. Raises ValueError if that is not UTF-8 text."""
    try:
        text = read()
        text.encode()  # in some locales Python reads other bytes as halves of characters
        return text
    except UnicodeError:
        raise ValueError("standard input is not UTF-8 text; convert it") from None


def one_line(error):
    """An error's first 300 printable characters in a line: it may quote a stranger's file."""
    line = str(error).strip().partition("\n")[0][:300]
    return "".join(c if c.isprintable() else "\ufffd" for c in line)

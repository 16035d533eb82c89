"""What every script does with files: UTF-8, whole files or none, short errors."""

import contextlib
import glob
import os
import shutil
import tempfile
import time
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(path):
    """Yield a new hidden folder beside `path`, for what is to become `path`; removed at the end.

    A killed process cannot remove its own. Those older than a day are removed here. Raises OSError.
    """
    prefix = f".nanoteal-{path.name[:60]}-"
    for left in path.parent.glob(glob.escape(prefix) + "*"):
        with contextlib.suppress(OSError):  # another process removes it, too
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def write_whole(path):
    """Yield a temporary path beside `path`, which takes its name if the block ends without error.

    Makes the folder if need be. A reader sees the old file or the new one, never half of one.
    Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        os.replace(temporary, path)


def require_writable(path, flag):
    """Raise ValueError if `write_whole` could not write to `path`, the value of `flag`.

    To be called before long work, whose results would be lost. It leaves nothing behind.
    """
    path = Path(path).absolute()
    try:
        folder = next(parent for parent in path.parents if parent.exists())
        with temporary_folder(folder / path.name):
            reason = "it is a folder" if path.is_dir() else None
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ValueError(f"cannot write {path} ({reason}); name another file with {flag}")


def read_text(path):
    """The text of a UTF-8 file, whatever its line ends, without a byte order mark.

    Raises OSError, and ValueError for a file of another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or "
                         "name another file") from None


def read_input(read):
    """What read() takes from standard input. Raises ValueError if that is not UTF-8 text."""
    try:
        # In some locales Python reads bytes beyond ASCII as halves of characters.
        text = read().encode("utf-8", "surrogateescape").decode("utf-8")
        return text.removeprefix("\ufeff")  # a byte order mark, as Windows writes it
    except UnicodeError:
        raise ValueError("standard input is not UTF-8 text; convert it") from None


def one_line(error):
    """An error's first 300 printable characters on one line: it may quote a stranger's file."""
    line = str(error).strip().partition("\n")[0][:300]
    return "".join(c if c.isprintable() else "\ufffd" for c in line)

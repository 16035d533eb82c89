"""Free memory as containers limit it, read from made-up files; and what loading a model needs."""

import ctypes
import io
import math
from pathlib import Path

import pytest
import torch

import checkpoint
import quantize
from checkpoint import memory
from checkpoint.config import parse_config
from checkpoint.conftest import CONFIG, resident, write_folder
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

def test_loading_needs_the_model_and_twice_its_largest_tensor(tmp_path, monkeypatch):
    # By default, glibc keeps freed blocks of up to 32 MB: much beside a small model.
    ctypes.CDLL(None).mallopt(-3, 131072)  # M_MMAP_THRESHOLD
    monkeypatch.setattr(quantize, "PIECE", 1 << 14)  # weights at a time: as small, beside this
    config = CONFIG | {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 1}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16)
               for name, shape in tensor_shapes(parse_config(config)).items()}
    floats, int4 = tmp_path / "floats", tmp_path / "int4"
    room = 2 * 512 * 4096 * 2 + (2 << 20)  # the largest tensor twice, and pieces
    write_folder(floats, config, tensors)
    quantize_folder.write_folder(checkpoint.open_checkpoint(floats), int4, "int4")
    del tensors
    # The first takes memory that is needed but once.
    for i, (source, kind) in enumerate([(floats, "int8"), (floats, "int8"), (floats, "int4"),
                                        (int4, None)]):
        memory.return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
        before = resident("VmRSS")
        model, _ = checkpoint.load(source, dtype=torch.bfloat16, quantize=kind)
        peak = resident("VmHWM") - before
        size = sum(m.w_t.nbytes + m.scale.nbytes for m in (*model.linears(), model.lm_head))
        del model
        assert i == 0 or size <= peak <= size + room, (kind, peak / 1e6, size / 1e6)

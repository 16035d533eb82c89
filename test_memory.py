"""Free memory as containers limit it, read from made-up files."""

import math
from pathlib import Path

import pytest
import torch

from checkpoint import memory

G = 1 << 30


def v2(limit, used, cache):
    return {"max": limit, "current": used,
            "stat": f"anon 5\nfile 7\ninactive_file {cache}\nactive_file 4"}


def v1(limit, used, cache):
    return {"limit_in_bytes": limit, "usage_in_bytes": used,
            "stat": f"inactive_file 3\ntotal_inactive_file {cache}"}


@pytest.mark.parametrize("groups_of_process, groups, expected", [
    ("", {}, math.inf),
    ("0::/", {}, math.inf),  # no container
    ("0::/", {"/": v2(8 * G, 3 * G, G)}, 6 * G),
    ("0::/", {"/": v2("max", 3 * G, G)}, math.inf),
    # the limit of the group around this one
    ("0::/a/b", {"/a/b": v2("max", G, 0), "/a": v2(4 * G, 3 * G, 0)}, G),
    ("0::/a", {"/a": v2(G, G + 5, 0)}, 0),
    ("9:name=systemd:/x\n4:memory:/docker/id\n0::/docker/id", {"memory/": v1(8 * G, 5 * G, G)},
     4 * G),
    ("4:memory:/a:b\n1:cpu:/k", {"memory/a:b": v1(3 * G, G, 0), "memory/": v1(1 << 62, 5 * G, G)},
     2 * G),
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
    assert memory.free_memory(torch.device("cpu")) <= expected


def test_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 5e9)
    memory.require_memory(5e9, "cpu", "a", "b")
    words = "the model needs 6.0 GB of memory, but 5.0 GB are free on cpu; buy some"
    with pytest.raises(ValueError, match=words):
        memory.require_memory(6e9, "cpu", "the model", "buy some")

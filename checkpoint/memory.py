"""How much memory is free. What cannot fit is refused in one sentence before it begins.

A computer hands out more memory than it has, and kills the program that begins to use it. A
container has a lower limit of its own. Linux tells both in text files (proc(5), cgroups(7)).
"""

import contextlib
import ctypes
import math
from pathlib import Path

import torch


def free_memory(device):
    """Free bytes of memory on a torch.device; infinity if the system does not say."""
    if device.type == "cuda":
        # PyTorch keeps memory that it no longer uses. That is free for us, too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = math.inf
    try:
        with open("/proc/meminfo") as f:
            lines = (line.split() for line in f)
            free = next(int(line[1]) << 10 for line in lines if line[0] == "MemAvailable:")
        return min(free, free_in_container())
    except (OSError, StopIteration):
        return free


def free_in_container():
    """Bytes that Linux's control groups leave this process; infinity without a limit."""
    free = math.inf
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, path = line.split(":", 2)  # 0::/a/b; a kind is one of version 1, which is not read
        # The limits of all groups around this one count. A container may see its own as /.
        for group in () if kind else (Path(path), *Path(path).parents):
            try:
                file = f"/sys/fs/cgroup{group}/memory."
                limit, used = (int(Path(file + name).read_text()) for name in ("max", "current"))
                stat = Path(file + "stat").read_text().split()
                cache = int(stat[stat.index("inactive_file") + 1])  # given back on demand
                free = min(free, max(0, limit - used + cache))
            except (OSError, ValueError):  # the group is hidden, or its limit is "max"
                pass
    return free


def require_memory(n_bytes, device, what, advice):
    """Raise ValueError, with advice, if a device has fewer than n_bytes free."""
    free = free_memory(torch.device(device))
    if n_bytes > free:
        raise ValueError(f"{what} needs {n_bytes / 1e9:.1f} GB of memory, but {free / 1e9:.1f} "
                         f"GB are free on {device}; {advice}")


def return_freed_memory():
    """Give the system what the allocator keeps of freed memory: after loading, much (glibc)."""
    with contextlib.suppress(OSError, AttributeError):  # of another libc
        ctypes.CDLL(None).malloc_trim(0)

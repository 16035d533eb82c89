"""How much memory is free, so that what cannot fit is refused in one sentence before it begins.

An ordinary computer hands out more memory than it has, and ends the program when it begins to use it; a container is
ended at its own, lower limit. So both are asked first. Linux tells them in text files (proc(5), cgroups(7)).
"""

import math
from pathlib import Path

import torch


def free_memory(device):
    """Bytes of memory that are free on a torch.device; infinity where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own reserve
        return torch.cuda.mem_get_info(device)[0] + unused
    free = math.inf
    try:
        with open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable:"))
        return min(free, free_in_container())
    except (OSError, StopIteration):
        return free


def free_in_container():
    """Bytes that Linux's control groups, the walls of a container, leave this process; infinity without a limit."""
    free = math.inf
    for line in Path("/proc/self/cgroup").read_text().splitlines():  # 0::/a/b in version 2, 4:memory:/a/b in version 1
        _, kind, path = line.split(":", 2)
        names = ("limit_in_bytes", "usage_in_bytes", "stat") if kind else ("max", "current", "stat")
        for group in (Path(path), *Path(path).parents):  # all their limits hold; a container may see its own as /
            try:
                folder = f"/sys/fs/cgroup/{kind}{group}"
                limit, used, stat = (Path(f"{folder}/memory.{name}").read_text().split() for name in names)
                cache = stat[stat.index("total_inactive_file" if kind else "inactive_file") + 1]  # given back on demand
                free = min(free, max(0, int(limit[0]) - int(used[0]) + int(cache)))
            except (OSError, ValueError):  # this container does not see the group, or its limit is "max"
                pass
    return free


def require_memory(n_bytes, device, what, advice):
    """Raise ValueError, saying what to do, if a device has fewer than these bytes free."""
    free = free_memory(torch.device(device))
    if n_bytes > free:
        raise ValueError(f"{what} needs {n_bytes / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free on "
                         f"{device}; {advice}")

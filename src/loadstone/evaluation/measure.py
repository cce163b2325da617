"""Peak and free memory of a device."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
# mallopt's number for the size from which blocks are mapped, and that size in bytes.
_MMAP_THRESHOLD, _LARGE = -3, 4 << 20


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of `peak_bytes` (where the system allows: Linux and CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # "5" resets the high-water mark of the resident set.
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes since `reset_peak`: of tensors on a GPU, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes; for a CPU what is available without swapping, within the limits of the
    control groups that a container or batch job runs in (https://docs.kernel.org/admin-guide/cgroup-v2.html)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 4 << 30
    for line in _lines(_MEMINFO):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return max(min([free, *_left_in_groups()]), 0)


def return_large_blocks() -> None:
    """Let the C library give freed blocks of a few megabytes back to the system at once (glibc; elsewhere nothing).

    By itself it puts blocks of up to 32 MB on a heap, whose holes later blocks of the same size often do not fit.
    """
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
    except (OSError, AttributeError):
        return


def _left_in_groups() -> list[int]:
    """Bytes left under each memory limit of this process's control groups (version 1 or 2) and their parents."""
    left = []
    for line in _lines(_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, cached = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used, cached = (
                _CGROUPS / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = root / path.strip("/")
        # In a container the path is the host's, and the container's own group is at the root.
        for folder in {root, *(f for f in (group, *group.parents) if f.is_relative_to(root))}:
            found = [
                _number(lines[0]) if (lines := _lines(folder / name)) else None for name in (limit, used)
            ]
            if found[0] is None or found[1] is None:
                continue
            # The page cache counts as used memory, but is freed when memory runs short.
            files = [n for n in _lines(folder / "memory.stat") if n.startswith(cached + " ")]
            left.append(found[0] - found[1] + (int(files[0].split()[1]) if files else 0))
    return left


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None

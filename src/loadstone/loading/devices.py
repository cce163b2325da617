"""The names of devices, checked."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from loadstone.errors import MissingError, UsageError

CPU, DISK = "cpu", "disk"


def check_device(device: str) -> None:
    """Raise `UsageError` unless it is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,9})?", device):
        raise UsageError(f"--device {device!s:.40} is not known", "One of auto, cpu, cuda, cuda:N")


def cuda_map(device: str) -> dict[str, str]:
    check_device(device)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        have = f"{count} CUDA device(s) are visible" if count else "no CUDA device is visible"
        raise MissingError(
            f"--device {device}: {have}", "Use --device cpu, or check the driver and the torch build"
        )
    return {"": f"cuda:{index}"}


def quantize_device(device: str) -> str:
    """The one device that weights are quantized on: ``auto`` is the first GPU, else the CPU."""
    if device == CPU or (device == "auto" and _certainly_no_gpu()):
        return CPU
    if device != "auto":
        return str(cuda_map(device)[""])
    import torch

    return "cuda:0" if torch.cuda.is_available() else CPU


def _certainly_no_gpu() -> bool:
    """Whether no GPU's driver shows on this machine, which is told without importing torch."""
    drivers = ("nvidia*", "nvhost*", "nvgpu*", "dxg", "kfd")
    return sys.platform == "linux" and not any(any(Path("/dev").glob(pattern)) for pattern in drivers)

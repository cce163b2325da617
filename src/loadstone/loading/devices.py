"""The names of devices, checked."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from loadstone.errors import MissingError, UsageError

CPU, DISK = "cpu", "disk"
P = ParamSpec("P")
R = TypeVar("R")


def check_device(device: str) -> None:
    """Raise `UsageError` unless it is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,9})?", device):
        shown = device if isinstance(device, str) else repr(device)
        raise UsageError(f"--device {shown:.40} is not known", "One of auto, cpu, cuda, cuda:N, as text")


def cpu_by_default(call: Callable[P, R]) -> Callable[P, R]:
    """``call``, in which tensors made without a device are on the CPU, whatever `torch.set_default_device` says."""

    @wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        torch = sys.modules.get("torch")
        if torch is None or torch.get_default_device().type == CPU:
            return call(*args, **kwargs)
        with torch.device(CPU):
            return call(*args, **kwargs)

    return called


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

"""Where a model goes: one device, or spread over GPUs, CPU and disk when it does not fit."""

from __future__ import annotations

import re
from typing import Any

from loadstone.artifact import Artifact
from loadstone.errors import MissingError, UsageError


def resolve_device(device: str, artifact: Artifact) -> Any:
    """The ``device_map`` for `from_pretrained`: None for CPU, ``{"": "cuda:0"}``, or ``"auto"`` (accelerate).

    ``auto`` is the first GPU when the weights fit its free memory with a tenth to spare, accelerate's split when
    they do not, and the CPU without a GPU. Raises `MissingError` for CUDA that is not there.
    """
    if device == "cpu":
        return None
    if device != "auto":
        return _cuda_map(device)
    import torch

    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(0)
    return {"": "cuda:0"} if weight_bytes(artifact) * 1.1 < free else "auto"


def _cuda_map(device: str) -> dict[str, str]:
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"--device {device} is not known", "One of auto, cpu, cuda, cuda:N")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        have = f"{count} CUDA device(s) are visible" if count else "no CUDA device is visible"
        raise MissingError(f"--device {device}: {have}", "Use --device cpu, or check the driver and the torch build")
    return {"": f"cuda:{index}"}


def weight_bytes(artifact: Artifact) -> int:
    """Bytes of all weight files."""
    return sum((artifact.path / file).stat().st_size for file in artifact.weights.files)


def quantize_device(device: str) -> str:
    """The one device that weights are quantized on: ``auto`` is the first GPU, else the CPU."""
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return "cpu" if device == "cpu" else str(_cuda_map(device)[""])

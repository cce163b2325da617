"""A safetensors file written tensor by tensor, so that saving a context holds no second copy of it.

The library's own writer wants all tensors in one dictionary on the CPU. Layout as it lays it
(https://github.com/huggingface/safetensors#format): by falling alignment, then name.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from loadstone.quantization.flatten import dtype_name


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors``, of any device, to ``path`` and sync it to disk; one of them at a time is on the CPU."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        end = position + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": dtype_name(tensor.dtype), "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, tensor in ordered:
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(content.data)
        file.flush()
        os.fsync(file.fileno())

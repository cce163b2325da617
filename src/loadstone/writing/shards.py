"""A safetensors shard written in place: header first, then each tensor's bytes at their offset, in any order.

Sizes are known from the plan, so no shard is ever held in memory. Within a shard tensors lie by falling alignment,
then name, as the reference writer lays them (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.artifact.formats.safetensors import DTYPE_BITS, TensorInfo

if TYPE_CHECKING:
    import torch


class ShardWriter:
    """One output file. ``write`` may be called from any thread; ``close`` syncs to disk."""

    def __init__(self, path: Path, tensors: list[TensorInfo], metadata: dict[str, str]) -> None:
        ordered = sorted(tensors, key=lambda t: (-DTYPE_BITS[t.dtype], t.name))
        header: dict[str, object] = {"__metadata__": metadata}
        self._offsets: dict[str, int] = {}
        position = 0
        for tensor in ordered:
            end = position + tensor.nbytes
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            self._offsets[tensor.name] = position
            position = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._base = 8 + len(raw)
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        os.write(self._file, struct.pack("<Q", len(raw)) + raw)
        os.ftruncate(self._file, self._base + position)

    def write(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        """Put a tensor's bytes where the header says ``name`` lies, ``offset`` bytes in."""
        import torch

        if tensor.numel() == 0:
            return
        tensor = tensor.detach().contiguous()
        if tensor.is_cuda:
            tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
        raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        position = self._base + self._offsets[name] + offset
        while raw:
            count = os.pwrite(self._file, raw, position)
            raw, position = raw[count:], position + count

    def flush(self) -> None:
        """Have the disk take what is written so far: the sync at the end then finds little to do."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Sync and close."""
        os.fsync(self._file)
        os.close(self._file)

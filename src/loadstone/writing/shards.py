"""safetensors files written tensor by tensor, so that no file is ever held in memory.

Format and order of tensors (by falling alignment, then name) are the reference writer's:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.artifact.formats.safetensors import DTYPE_BITS, TensorInfo
from loadstone.artifact.torchao.flatten import dtype_name, tensor_bytes
from loadstone.writing.filesystem import sync_file

if TYPE_CHECKING:
    import torch


class ShardWriter:
    """A file whose tensors are known beforehand and may be written in any order, and by rows.

    ``write`` may be called from any thread; ``close`` syncs to disk.
    """

    def __init__(self, path: Path, tensors: list[TensorInfo], metadata: dict[str, str]) -> None:
        ordered = sorted(tensors, key=lambda t: (-DTYPE_BITS[t.dtype], t.name))
        self._offsets: dict[str, int] = {}
        position = 0
        for tensor in ordered:
            self._offsets[tensor.name] = position
            position += tensor.nbytes
        raw = _header([(t.name, t.dtype, t.shape, t.nbytes) for t in ordered], metadata)
        raw += b" " * (-len(raw) % 8)
        self._base = 8 + len(raw)
        self._folder = path.parent
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        os.write(self._file, struct.pack("<Q", len(raw)) + raw)
        os.ftruncate(self._file, self._base + position)

    def write(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        """Put a tensor's bytes where the header says ``name`` lies, ``offset`` bytes in."""
        import torch

        if tensor.numel() == 0:
            return
        if tensor.is_cuda:
            tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
        raw = tensor_bytes(tensor)
        position = self._base + self._offsets[name] + offset
        while raw:
            count = os.pwrite(self._file, raw, position)
            raw, position = raw[count:], position + count

    def flush(self) -> None:
        """Have the disk take what is written so far: the sync at the end then finds little to do."""
        sync_file(self._file, self._folder, os.fdatasync)

    def close(self) -> None:
        """Sync and close."""
        try:
            sync_file(self._file, self._folder)
        finally:
            os.close(self._file)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, of any device, to one file and sync it to disk; one of them at a time is copied to the CPU."""
    infos = [TensorInfo(n, dtype_name(t.dtype), tuple(t.shape), "", 0, t.nbytes) for n, t in tensors.items()]
    writer = ShardWriter(path, infos, {"format": "pt"})
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    finally:
        writer.close()


def _header(entries: list[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The JSON header of tensors that follow each other: (name, dtype, shape, bytes) each."""
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape, nbytes in entries:
        end = position + nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

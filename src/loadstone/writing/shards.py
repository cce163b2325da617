"""safetensors files written tensor by tensor, so that no file is ever held in memory.

Format and order of tensors (by falling alignment, then name) are the reference writer's:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.artifact.formats.safetensors import DTYPE_BITS, TensorInfo
from loadstone.artifact.torchao.flatten import dtype_name, tensor_bytes
from loadstone.writing.filesystem import sync_file

if TYPE_CHECKING:
    import torch


# Bytes hashed at once: each time waits for the interpreter's lock twice.
_HASHED = 1 << 20


class ShardWriter:
    """A file whose tensors are known beforehand and may be written in any order, and by rows, each byte once.

    ``write`` may be called from any thread; ``close`` syncs to disk; ``digest`` hashes what the others write.
    """

    def __init__(self, path: Path, tensors: list[TensorInfo], metadata: dict[str, str]) -> None:
        ordered = sorted(tensors, key=file_order)
        raw = _header([(t.name, t.dtype, t.shape, t.nbytes) for t in ordered], metadata)
        raw += b" " * (-len(raw) % 8)
        self._begins: dict[str, int] = {}
        self._size = 8 + len(raw)
        # All before it is written; what is written behind it, as begin -> end.
        self._prefix, self._behind = self._size, dict[int, int]()
        for tensor in ordered:
            self._begins[tensor.name] = self._size
            self._size += tensor.nbytes
        self._closed, self._change = False, threading.Condition()
        # Where `digest` waits for the prefix to come.
        self._wanted = 0
        self._path = path
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        self._put(struct.pack("<Q", len(raw)) + raw, 0)
        os.ftruncate(self._file, self._size)

    def write(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        """Put a tensor's bytes where the header says ``name`` lies, ``offset`` bytes in."""
        import torch

        if tensor.numel() == 0:
            return
        if tensor.is_cuda:
            tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
        raw = tensor_bytes(tensor)
        begin = self._begins[name] + offset
        self._put(raw, begin)
        with self._change:
            self._behind[begin] = begin + len(raw)
            while self._prefix in self._behind:
                self._prefix = self._behind.pop(self._prefix)
            if self._prefix >= self._wanted:
                self._change.notify_all()

    def _put(self, raw: bytes | memoryview, position: int) -> None:
        while raw:
            count = os.pwrite(self._file, raw, position)
            raw, position = raw[count:], position + count

    def digest(self) -> str:
        """Hex sha256 of the file: hashes it from the beginning as it is written, and ends when all is there."""
        total, buffer, position = hashlib.sha256(), memoryview(bytearray(_HASHED)), 0
        with self._path.open("rb", buffering=0) as file:
            while position < self._size:
                with self._change:
                    self._wanted = min(position + _HASHED, self._size)
                    while self._prefix < self._wanted and not self._closed:
                        self._change.wait()
                    ready = self._prefix
                if ready == position:
                    raise ValueError(f"{self._path} was closed before it was complete")
                while position < ready:
                    count = file.readinto(buffer[: ready - position])
                    if not count:
                        raise OSError(errno.EIO, "it was cut while it was written", str(self._path))
                    total.update(buffer[:count])
                    position += count
        return total.hexdigest()

    def flush(self) -> None:
        """Have the disk take what is written so far: the sync at the end then finds little to do."""
        sync_file(self._file, self._path.parent, os.fdatasync)

    def close(self) -> None:
        """Sync and close."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        try:
            sync_file(self._file, self._path.parent)
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


def file_order(tensor: TensorInfo) -> tuple[int, str]:
    """What tensors are sorted by in a file."""
    return -DTYPE_BITS[tensor.dtype], tensor.name


def _header(entries: list[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The JSON header of tensors that follow each other: (name, dtype, shape, bytes) each."""
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape, nbytes in entries:
        end = position + nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

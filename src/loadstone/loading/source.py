"""Source tensors, one at a time, without keeping the file mapped (resident memory stays that of one tensor)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, TensorInfo
from loadstone.errors import ArtifactError
from loadstone.quantization.flatten import torch_dtype

if TYPE_CHECKING:
    import torch

# Bytes that one thread reads, and the most threads, of a large tensor.
_RANGE = 1 << 24
_READERS = 4


class SourceReader:
    """Reads the tensors of one artifact by their `TensorInfo`; close it when done."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._bins: dict[str, Any] = {}

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The tensor on the CPU, in its stored dtype; raises `ArtifactError` when the file ends inside it."""
        if self.artifact.weights.format == "bin":
            return self._read_bin(info)
        if self.artifact.dcp is not None:
            from loadstone.loading.dcpfiles import read_dcp_tensor

            return read_dcp_tensor(self.artifact, info.name)
        import torch

        buffer = bytearray(info.nbytes)
        view = memoryview(buffer)
        starts = range(0, info.nbytes, _RANGE)
        if len(starts) > 1 and (threads := min((os.cpu_count() or 1) // 4, _READERS)) > 1:
            # One thread copies from the page cache at a fraction of what memory and disk can give.
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda at: self._read_range(info, at, view[at : at + _RANGE]), starts))
        else:
            self._read_range(info, 0, view)
        if not buffer:
            return torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        return torch.frombuffer(buffer, dtype=torch_dtype(info.dtype)).reshape(info.shape)

    def _read_range(self, info: TensorInfo, start: int, view: memoryview) -> None:
        with (self.artifact.path / info.file).open("rb", buffering=0) as file:
            file.seek(info.begin + start)
            count = 0
            while count < len(view):
                got = file.readinto(view[count:])
                if not got:
                    raise ArtifactError(
                        f"{info.file}: truncated inside tensor '{info.name}'", "Copy the file again"
                    )
                count += got

    def _read_bin(self, info: TensorInfo) -> torch.Tensor:
        if info.file not in self._bins:
            from loadstone.loading.binfiles import read_bin_file

            # Steps come in name order, not file order: mapped files cost no memory, so all stay open.
            self._bins[info.file] = read_bin_file(self.artifact.path / info.file)
        return self._bins[info.file][info.name].contiguous()

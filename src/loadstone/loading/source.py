"""Source tensors, one at a time, without keeping the file mapped (resident memory stays that of one tensor)."""

from __future__ import annotations

import os
import threading
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
    """Reads the tensors of one artifact by their `TensorInfo`, from any thread."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._bins: dict[str, Any] = {}
        self._opening = threading.Lock()

    @property
    def divisible(self) -> bool:
        """Whether a part of a tensor can be read without the rest."""
        return self.artifact.dcp is None

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The tensor on the CPU, in its stored dtype; raises `ArtifactError` when the file ends inside it."""
        return self.span(info, 0, info.numel).reshape(info.shape)

    def span(self, info: TensorInfo, start: int, stop: int, *, pinned: bool = False) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor, as `read` gives them. ``pinned``: in page-locked
        memory where they are read from a safetensors file, for a GPU to take."""
        if self.artifact.weights.format == "bin":
            return self._read_bin(info).reshape(-1)[start:stop]
        if self.artifact.dcp is not None:
            from loadstone.loading.dcpfiles import read_dcp_tensor

            return read_dcp_tensor(self.artifact, info.name).reshape(-1)[start:stop]
        import torch

        dtype = torch_dtype(info.dtype)
        values = torch.empty(stop - start, dtype=dtype, pin_memory=pinned)
        if not len(values):
            return values
        view = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
        first = info.begin + start * dtype.itemsize
        starts = range(0, len(view), _RANGE)
        if len(starts) > 1 and (threads := min((os.cpu_count() or 1) // 4, _READERS)) > 1:
            # One thread copies from the page cache at a fraction of what memory and disk can give.
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda at: self._read_range(info, first + at, view[at : at + _RANGE]), starts))
        else:
            self._read_range(info, first, view)
        return values

    def _read_range(self, info: TensorInfo, start: int, view: memoryview) -> None:
        """Fill ``view`` with the file's bytes from ``start`` on."""
        with (self.artifact.path / info.file).open("rb", buffering=0) as file:
            file.seek(start)
            count = 0
            while count < len(view):
                got = file.readinto(view[count:])
                if not got:
                    raise ArtifactError(
                        f"{info.file}: truncated inside tensor '{info.name}'", "Copy the file again"
                    )
                count += got

    def _read_bin(self, info: TensorInfo) -> torch.Tensor:
        with self._opening:
            if info.file not in self._bins:
                from loadstone.loading.binfiles import read_bin_file

                # Steps come in name order, not file order: mapped files cost no memory, so all stay open.
                self._bins[info.file] = read_bin_file(self.artifact.path / info.file)
        return self._bins[info.file][info.name].detach().contiguous()

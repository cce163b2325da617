"""Tensors of a torch distributed checkpoint (FSDP, accelerate), put together from their slices one at a time."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.errors import ArtifactError
from loadstone.loading.values import check_tensor
from loadstone.quantization.flatten import torch_dtype

if TYPE_CHECKING:
    import torch


class LazyDcp:
    """A tensor before it is read; ``lazy[...]`` reads it, as a safetensors slice does."""

    def __init__(self, artifact: Artifact, name: str) -> None:
        self.artifact = artifact
        self.name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return read_dcp_tensor(self.artifact, self.name)


def read_dcp_tensor(artifact: Artifact, name: str) -> torch.Tensor:
    """One whole tensor on the CPU; raises `ArtifactError` when a slice is damaged or holds NaN or infinity."""
    import torch

    assert artifact.dcp is not None
    info = artifact.dcp.tensors[name]
    whole = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    for chunk in artifact.dcp.chunks[name]:
        with (artifact.path / chunk.file).open("rb") as file:
            file.seek(chunk.begin)
            raw = file.read(chunk.end - chunk.begin)
        try:
            part = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
            place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            if tuple(part.shape) != tuple(chunk.sizes) or part.dtype != whole.dtype:
                raise ValueError(
                    f"it is {part.dtype} {list(part.shape)}, not {whole.dtype} {list(chunk.sizes)}"
                )
            whole[place].copy_(part)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{chunk.file}: the slice of '{name}' at {list(chunk.offsets)} cannot be read ({reason})",
                "Copy the checkpoint again",
            ) from None
    check_tensor(whole, info)
    return whole

"""``.bin`` shards: plain and torchao tensors, read with ``weights_only=True`` and nothing less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.torchao.tensors import part_name, unknown_class_hint
from loadstone.errors import ArtifactError
from loadstone.loading.values import check_tensor, limits_of
from loadstone.quantization.flatten import flatten

if TYPE_CHECKING:
    import torch


def read_bins(artifact: Artifact, dtype: torch.dtype | None) -> dict[str, Any]:
    """All tensors of the ``.bin`` shards by name, memory-mapped; quantized ones brought to ``dtype`` if given.

    Raises `ArtifactError` for a file that holds more than tensors and for values that no sound tensor has.
    """
    import torch

    state: dict[str, Any] = {}
    for contents in artifact.bins:
        for name, tensor in read_bin_file(artifact.path / contents.file).items():
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                check_tensor(tensor, contents.tensors[name])
                state[name] = tensor
            else:
                state[name] = _lazy(contents.file, name, tensor, dtype)
    return state


def _lazy(file: str, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> Any:
    from loadstone.loading.lazy import LazyQuantized

    flat, parts = flatten(name, tensor)
    # Named and limited as the parts that the same tensor has in safetensors.
    named = {key: info._replace(name=part_name(name, key), file=file) for key, info in flat.parts.items()}
    limits = limits_of([replace(flat, parts=named)])
    for key, part in parts.items():
        check_tensor(part, named[key], limits)
    return LazyQuantized(flat, dict(parts), dtype)


def read_plain_values(path: Path) -> Any:
    """What a file of `torch.save` holds, tensors memory-mapped; raises `ArtifactError` when that is more than tensors
    and plain values."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{path.name}: cannot be read with weights_only=True ({reason})",
            f"loadstone runs no pickled code: save it as safetensors where it was made. {unknown_class_hint(reason)}",
        ) from None


def read_bin_file(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of one ``.bin``, memory-mapped; raises `ArtifactError` when it holds more than tensors."""
    import torch

    # Importing torchao registers its tensor classes as safe globals; nothing else is allowed in.
    import torchao.prototype.mx_formats
    import torchao.quantization  # noqa: F401

    state = read_plain_values(path)
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArtifactError(
                f"{path.name}: '{name}' is a {type(tensor).__name__}, not a tensor", "Save weights only"
            )
    return state

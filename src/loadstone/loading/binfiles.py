"""``.bin`` shards: plain and torchao tensors, read with ``weights_only=True`` and nothing less."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.torchao_tensors import unknown_class_hint
from loadstone.errors import ArtifactError
from loadstone.quantization.flatten import flatten

if TYPE_CHECKING:
    import torch


def read_bins(artifact: Artifact, dtype: torch.dtype | None) -> dict[str, Any]:
    """All tensors of the ``.bin`` shards by name, memory-mapped; quantized ones brought to ``dtype`` if given."""
    import torch

    if artifact.is_torchao:
        # Importing torchao registers its tensor classes as safe globals; nothing else is allowed in.
        import torchao.prototype.mx_formats
        import torchao.quantization  # noqa: F401
    state: dict[str, Any] = {}
    for file in artifact.weights.files:
        for name, tensor in read_bin_file(artifact.path / file).items():
            if name in state:
                raise ArtifactError(
                    f"{file}: tensor '{name}' is in an earlier shard too", "Remove the stale shard"
                )
            if tensor.is_floating_point() and type(tensor) is torch.Tensor and not tensor.isfinite().all():
                raise ArtifactError(
                    f"{file}: tensor '{name}' holds NaN or infinity", "Use another checkpoint"
                )
            state[name] = (
                tensor if type(tensor) in (torch.Tensor, torch.nn.Parameter) else _lazy(name, tensor, dtype)
            )
    return state


def _lazy(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> Any:
    from loadstone.loading.lazy import LazyQuantized

    flat, parts = flatten(name, tensor)
    return LazyQuantized(flat, dict(parts), dtype)


def read_bin_file(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of one ``.bin``, memory-mapped; raises `ArtifactError` when it holds more than tensors."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{path.name}: cannot be read with weights_only=True ({reason})",
            f"loadstone runs no pickled code: save it as safetensors where it was made. {unknown_class_hint(reason)}",
        ) from None
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArtifactError(
                f"{path.name}: '{name}' is a {type(tensor).__name__}, not a tensor", "Save weights only"
            )
    return state

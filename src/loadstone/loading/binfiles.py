"""``.bin`` shards: plain and torchao tensors, read with ``weights_only=True`` and nothing less."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, FlatTensor, TensorInfo
from loadstone.artifact.torchao_tensors import SUBCLASSES, unknown_class_hint
from loadstone.errors import ArtifactError

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
        try:
            shard = torch.load(artifact.path / file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{file}: cannot be read with weights_only=True ({reason})",
                "loadstone runs no pickled code: save it as safetensors where it was made. "
                + unknown_class_hint(reason),
            ) from None
        while isinstance(shard.get("state_dict"), dict):
            shard = shard["state_dict"]
        for name, tensor in shard.items():
            if not isinstance(tensor, torch.Tensor):
                raise ArtifactError(f"{file}: '{name}' is a {type(tensor).__name__}, not a tensor", "Save weights only")
            if name in state:
                raise ArtifactError(f"{file}: tensor '{name}' is in an earlier shard too", "Remove the stale shard")
            state[name] = tensor if type(tensor) in (torch.Tensor, torch.nn.Parameter) else _lazy(name, tensor, dtype)
    return state


def flatten(name: str, tensor: torch.Tensor, file: str = "") -> tuple[FlatTensor, dict[str, torch.Tensor]]:
    """A live torchao tensor as the facts and parts that safetensors would hold; raises for an unknown class."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    kind = type(tensor).__name__
    if kind not in SUBCLASSES:
        raise ArtifactError(f"tensor '{name}' has the unknown quantized class '{kind}'", unknown_class_hint(kind))
    # torchao wants a module path before the parameter's name.
    data, metadata = flatten_tensor_state_dict({"m.weight": tensor.detach()})
    text = metadata["m.weight"]
    description = json.loads(text)
    parts = {n: data[f"m._weight_{n}"] for n in description["_tensor_data_names"]}
    infos = {n: TensorInfo(n, str(p.dtype), tuple(p.shape), file, 0, p.nbytes) for n, p in parts.items()}
    return FlatTensor(name, kind, description["_data"], infos, text), parts


def _lazy(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> Any:
    from loadstone.loading.lazy import LazyQuantized

    flat, parts = flatten(name, tensor)
    return LazyQuantized(flat, dict(parts), dtype)

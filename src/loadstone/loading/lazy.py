"""Tensors that are read when transformers asks for them: a state dict that costs nothing until it is used.

transformers' loader takes any mapping whose values answer ``value[...]`` and then ``.to(device=…, dtype=…)``
(core_model_loading._materialize_copy). Plain tensors are safetensors slices, as in transformers itself; a quantized
tensor is rebuilt here from its parts and its own metadata only, which keeps a load linear in the number of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.compressed_tensors.tensors import is_side_tensor
from loadstone.artifact.unchanged import check_unchanged
from loadstone.loading.packed import LazyPacked, empty_biases
from loadstone.loading.rebuild import LazyQuantized

if TYPE_CHECKING:
    import torch


class LazyUncast:
    """A stored tensor that keeps its dtype, whatever dtype transformers asks for."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.part[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor: torch.Tensor = self.part[...]
        return tensor if device is None else tensor.to(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)


@contextmanager
def lazy_state_dict(artifact: Artifact, dtype: torch.dtype | None) -> Iterator[dict[str, Any]]:
    """Every tensor of the artifact by its checkpoint name, unread; files stay open for the block's duration.

    ``dtype``: None leaves quantized tensors as stored.
    """
    with artifact.source.opened() as (stored, quantized):
        # From here on the files stay those that are open.
        check_unchanged(artifact.path, artifact.stamp)
        state: dict[str, Any] = {}
        for name, flat in quantized.items():
            parts = {data_name: stored.pop(info.name) for data_name, info in flat.parts.items()}
            state[name] = LazyQuantized(flat, parts, dtype)
        for name, weight in artifact.packed.items():
            state[name] = LazyPacked(weight, {s: stored.pop(p.name) for s, p in weight.parts.items()}, dtype)
        if artifact.is_torchao:
            # transformers casts no integers of a quantized checkpoint, not even beside layers kept in float32.
            stored = {
                name: part if artifact.tensors[name].dtype.startswith(("F", "BF")) else LazyUncast(part)
                for name, part in stored.items()
            }
        if artifact.packed:
            # Scales of inputs and of the KV cache are for kernels: the model has no such parameters.
            left_out = empty_biases(artifact)
            stored = {n: part for n, part in stored.items() if not is_side_tensor(n) and n not in left_out}
        yield state | stored

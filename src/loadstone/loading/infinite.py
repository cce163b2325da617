"""Infinite values that belong to a model: buffers that it makes so itself, such as limits that limit nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadstone.artifact import Artifact, TensorInfo
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES

if TYPE_CHECKING:
    import torch

# Buffers are small, and no module calls one so.
_LARGEST = 1 << 16
_PARAMETERS = (".weight", ".bias")


def infinite_buffers(artifact: Artifact, trust_remote_code: bool = False) -> frozenset[str]:
    """The stored buffers with infinite values in the places where the model's own, before a load, are infinite too.

    Only small tensors under other names than a layer's are read; the model is built if one of them is infinite.
    """
    import torch

    # Other formats are checked as they are read.
    if artifact.weights.format != "safetensors" or artifact.packed:
        return frozenset()
    parts = {part.name for tensor in artifact.quantized.values() for part in tensor.parts.values()}
    asked = [t for t in artifact.tensors.values() if t.name not in parts and _may_be_buffer(t)]
    stored = {info.name: artifact.source.read(info) for info in asked}
    infinite = {name: tensor for name, tensor in stored.items() if tensor.isinf().any()}
    if not infinite:
        return frozenset()
    from loadstone.loading.meta import destinations, skeleton
    from loadstone.loading.model_class import construction, load_config, model_class_of

    config = load_config(artifact, trust_remote_code)
    model_class = model_class_of(config, artifact, trust_remote_code)
    with construction(artifact, model_class):
        model = skeleton(model_class, config, torch.float32)
    own = dict(model.named_buffers())
    places = destinations(model, list(infinite))
    return frozenset(
        name for name, place in places.items() if place and _alike(infinite[name], own.get(place.parameter))
    )


def _may_be_buffer(info: TensorInfo) -> bool:
    return info.dtype in FLOAT_DTYPES and info.numel <= _LARGEST and not info.name.endswith(_PARAMETERS)


def _alike(stored: torch.Tensor, own: torch.Tensor | None) -> bool:
    """Whether both are infinite in the same places with the same sign, and NaN nowhere."""
    import torch

    if own is None or own.shape != stored.shape or stored.isnan().any():
        return False
    signs = [torch.where(t.isinf(), t.sign(), 0).float() for t in (stored, own)]
    return torch.equal(*signs)

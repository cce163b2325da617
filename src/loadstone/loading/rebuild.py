"""torchao's tensors rebuilt from their parts and their own metadata."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from loadstone.artifact import FlatTensor
from loadstone.errors import ArtifactError
from loadstone.loading.part import LazyPart
from loadstone.loading.repack import int4_tiles_to_cpu

if TYPE_CHECKING:
    import torch

# Parts that follow the model's dtype; scales of every other class keep their own (float32, float8) dtype.
_PARTS_IN_MODEL_DTYPE = {"IntxUnpackedToInt8Tensor": ("scale",)}


class LazyQuantized:
    """A quantized tensor before it is read. ``parts`` maps torchao's data names to sources that answer ``[...]``."""

    def __init__(self, flat: FlatTensor, parts: dict[str, Any], dtype: torch.dtype | None) -> None:
        self.flat = flat
        self.parts = parts
        self.dtype = dtype

    def __getitem__(self, index: Any) -> LazyQuantized | LazyPart:
        # A part is asked for where a weight is divided among ranks.
        return self if index is Ellipsis else LazyPart(lambda device, dtype: self.to(device, dtype)[index])

    def to(self, device: Any = None, dtype: Any = None) -> torch.Tensor:
        """The torchao tensor on ``device``. ``dtype`` is transformers' wish for plain tensors and is not used."""
        parts = {name: source[...] for name, source in self.parts.items()}
        if device is not None:
            parts = {name: part.to(device) for name, part in parts.items()}
        return rebuild(self.flat, parts, self.dtype)

    def get_shape(self) -> list[int]:
        return list(self.flat.shape)

    def get_dtype(self) -> str:
        """What a safetensors slice answers: the model sees a quantized weight as its own floating dtype."""
        return "BF16"


def rebuild(
    flat: FlatTensor, parts: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """One torchao tensor from its parts (by torchao's data names) and its own metadata.

    ``dtype`` (None: as stored) is the floating type that the tensor stands for and computes in. Raises
    `ArtifactError`, naming the tensor, when the parts do not make one.
    """
    from torchao.prototype.safetensors.safetensors_utils import object_from_dict

    description = json.loads(flat.metadata)
    attributes = description["_data"]
    if flat.type == "Int4TilePackedTo4dTensor":
        if parts["qdata"].device.type == "cpu":
            return int4_tiles_to_cpu(flat, parts, dtype or parts["scale_and_zero"].dtype)
        # The CUDA kernel computes in bfloat16 whatever comes in, and gives back the dtype it was given.
    elif dtype is not None:
        key = "orig_dtype" if "orig_dtype" in attributes else "dtype"
        wanted = str(dtype).removeprefix("torch.")
        attributes[key] = {"_type": "torch.dtype", "_data": wanted}
        for name in _PARTS_IN_MODEL_DTYPE.get(flat.type, ()):
            parts[name] = parts[name].to(dtype)
    attributes.update(parts)
    try:
        found: torch.Tensor = object_from_dict(description)
        _allow_views(type(found))
        return found
    except Exception as error:
        raise ArtifactError(
            f"tensor '{flat.name}': torchao cannot rebuild it ({error})", "Finalize again"
        ) from None


@cache
def _allow_views(kind: Any) -> None:
    """Let views of a class of torchao's tensors be taken under `torch.inference_mode` (an expert of a 3-D weight, the
    `detach` of a state dict).

    torchao 0.18 makes a view as a new tensor, which is an inference tensor there, and torch refuses one whose base is
    not ("Cannot set version_counter for inference tensor").
    """
    import torch

    own = kind.__torch_dispatch__.__func__

    def dispatch(cls: Any, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and getattr(function, "is_view", False):
            with torch.inference_mode(False), torch.no_grad():
                return own(cls, function, types, args, kwargs)
        return own(cls, function, types, args, kwargs)

    kind.__torch_dispatch__ = classmethod(dispatch)

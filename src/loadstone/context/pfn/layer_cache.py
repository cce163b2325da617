"""Keys and values of one layer's training rows, stored in the model's dtype, bfloat16 or int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loadstone.errors import UsageError

# Name on disk and on the command line -> what a key or value is stored as. "model" is the model's own dtype.
CACHE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True, eq=False)
class LayerCache:
    """``keys`` and ``values`` are (tokens, heads, rows, head size); the scales of an int8 cache are
    (tokens, heads, 1, head size), float32: one for each head and channel."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in the dtype of the queries. Only one layer at a time is ever expanded."""
        return _expand(self.keys, self.key_scale, dtype), _expand(self.values, self.value_scale, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        named = {
            "keys": self.keys,
            "values": self.values,
            "key_scale": self.key_scale,
            "value_scale": self.value_scale,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> LayerCache:
        return LayerCache(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def store(keys: Tensor, values: Tensor, dtype: torch.dtype) -> LayerCache:
    """Store keys and values in ``dtype``; with int8, symmetric and scaled to each head and channel's largest."""
    if dtype != torch.int8:
        return LayerCache(keys.to(dtype), values.to(dtype))
    k, k_scale = _to_int8(keys)
    v, v_scale = _to_int8(values)
    return LayerCache(k, v, k_scale, v_scale)


def parse_cache_dtype(name: str | None, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype a cache is stored in (None: the model's); raises `UsageError` for an unknown one."""
    if name is None:
        return model_dtype
    if name not in CACHE_DTYPES:
        raise UsageError(f"a cache cannot be stored in {name!r}", f"One of {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES[name]


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-2, keepdim=True).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def _expand(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if scale is None else x.to(dtype) * scale.to(dtype)

"""A part of a stored tensor, which is read and decoded when transformers says where it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class LazyPart:
    """What ``value[index]`` gives where a tensor is divided among ranks: ``read(device, dtype)`` reads the part."""

    def __init__(self, read: Callable[[Any, Any], torch.Tensor], dtype: torch.dtype | None = None) -> None:
        self._read = read
        self._dtype = dtype

    def to(self, device: Any = None, dtype: Any = None) -> torch.Tensor:
        return self._read(device, dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # transformers concatenates the parts of fused weights before it says where they go.
        parts = [part.to(dtype=part._dtype) for part in args[0]]
        return function(parts, *args[1:], **(kwargs or {}))

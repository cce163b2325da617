"""Rounding of activations: torchao's operations in torchao's order, with the same bits, in fewer passes over memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

_CACHED_ELEMENTS = 1 << 16
_HALF_RANGE = 127.5


def int8_round_trip(x: torch.Tensor) -> torch.Tensor:
    """x (..., in) quantized to int8 per token, asymmetrically, and dequantized; a few rows at a time, so that the
    passes stay in the CPU cache."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows)
    # The compiler fuses the passes; blocks would only be unrolled.
    at_once = max(1, len(rows) if torch.compiler.is_compiling() else _CACHED_ELEMENTS // x.shape[-1])
    for some, rounded in zip(rows.split(at_once), out.split(at_once), strict=True):
        # Two reductions: `aminmax` is ten times slower than both.
        low, high = some.amin(-1, keepdim=True).clamp_(max=0), some.amax(-1, keepdim=True).clamp_(min=0)
        scale = ((high - low) / 255.0).clamp_(min=torch.finfo(x.dtype).smallest_normal)
        zero = (-128 - (low / scale).round_()).clamp_(-128, 127)
        torch.mul(some, 1.0 / scale, out=rounded)
        rounded.round_().add_(zero).clamp_(-128, 127).sub_(zero).mul_(scale)
    return out.reshape(x.shape)


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., in) as int8 values (..., in) and float32 scales (..., 1), symmetric per token."""
    largest = torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)).clamp(min=0)
    scale = (largest / _HALF_RANGE).clamp(min=torch.finfo(torch.float32).eps).float()
    return (x * (1.0 / scale)).round_().clamp_(-128, 127).to(torch.int8), scale


@lru_cache
def mx_round_trip(
    elem_dtype: Any, block_size: int, scaling_mode: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that quantizes x (..., in) to an MX format and dequantizes it; the same one for the same format."""
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    def rounding(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        scale, values = to_mx(rows, elem_dtype, block_size, scaling_mode)
        result: torch.Tensor = to_dtype(values, scale, elem_dtype, block_size, x.dtype)
        return result.reshape(x.shape)

    return rounding


@lru_cache
def float8_rounding(*how: Any) -> Callable[[torch.Tensor], Any]:
    """A function that rounds x (..., in) to torchao's Float8Tensor, ``how``: the arguments of its ``from_hp``; the same
    one for the same arguments."""
    from torchao.quantization import Float8Tensor

    return lambda x: Float8Tensor.from_hp(x, *how)


class SharedRounding:
    """A rounding that is computed once for modules that get the same input, such as q, k and v, or gate and up.

    The result lives as long as the input tensor, and is found by the tensor's identity: modules that share it must not
    change their input in place.
    """

    def __init__(self, rounding: Callable[[torch.Tensor], Any]) -> None:
        self.rounding = rounding
        self._source: weakref.ref[torch.Tensor] | None = None
        self._result: Any = None

    def __call__(self, x: torch.Tensor) -> Any:
        if torch.compiler.is_compiling():
            return self.rounding(x)
        if self._source is None or self._source() is not x:
            self._result = self.rounding(x)
            self._source = weakref.ref(x, self._forget)
        return self._result

    def _forget(self, source: weakref.ref[torch.Tensor]) -> None:
        if self._source is source:
            self._source = self._result = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedRounding:
        memo[id(self)] = copy = SharedRounding(self.rounding)
        return copy


def share_rounding(model: nn.Module, kinds: type | tuple[type, ...]) -> None:
    """Let modules of some ``kinds`` in one parent module, such as q, k and v, round their common input once."""
    for parent in model.modules():
        shared: dict[Callable[[torch.Tensor], Any], SharedRounding] = {}
        for module in parent.children():
            rounding: Any = getattr(module, "rounding", None)
            if isinstance(module, kinds) and rounding is not None:
                module.rounding = shared.setdefault(rounding, SharedRounding(rounding))  # type: ignore[assignment]

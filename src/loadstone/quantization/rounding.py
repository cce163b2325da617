"""Intx rounding that torchao does not have: for each group the scale with the least squared error.

The result is torchao's own tensor class with other integers and scales, so it loads wherever plain rounding loads.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from loadstone.quantization.schemes import Intx

if TYPE_CHECKING:
    import torch

# Scales to try, as shares of the plain one: clipping outliers can round the other values better.
_SHARES = tuple(0.50 + 0.0125 * step for step in range(45))
_BLOCK = 1 << 22
# Values that a GPU rounds at once in trying scales.
_TOGETHER = 1 << 25


def intx_tensor(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    scheme: Intx,
) -> torch.Tensor:
    """torchao's tensor of given integers (out, in), and scales and zero points (out, groups)."""
    import torch
    from torchao.quantization import IntxUnpackedToInt8Tensor

    return IntxUnpackedToInt8Tensor(
        qdata.to(torch.int8),
        scale,
        zero_point.to(torch.int8),
        getattr(torch, f"int{scheme.bits}"),
        (1, scheme.group_size or qdata.shape[1]),
        scale.dtype,
        # The text, as torchao's own configs give it: the enum's member would be saved under its class's name.
        "int8_asym_per_token" if scheme.dynamic_inputs else None,
    )


def plain_scales(weight: torch.Tensor, scheme: Intx) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's plain scale and zero point for each group of ``weight`` (out, in)."""
    import torch
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine_with_min_max

    # Scales follow from each group's extremes alone, and torch finds those ten times faster in float32.
    values = weight.float()
    grouped = values.unflatten(1, (-1, scheme.group_size or weight.shape[1]))
    if scheme.mapping == "symmetric":
        # In place where `float` made a copy.
        size = grouped.abs() if values.dtype == weight.dtype else grouped.abs_()
        mapping, high = MappingType.SYMMETRIC, size.amax(-1).to(weight.dtype)
        low = -high
    else:
        mapping = MappingType.ASYMMETRIC
        low, high = (each.to(weight.dtype) for each in (grouped.amin(-1), grouped.amax(-1)))
    return choose_qparams_affine_with_min_max(
        low,
        high,
        mapping,
        (),
        target_dtype=torch.int8,
        quant_min=-(2 ** (scheme.bits - 1)),
        quant_max=2 ** (scheme.bits - 1) - 1,
        zero_point_dtype=torch.int8,
    )


def least_squares_scales(
    weight: torch.Tensor,
    scheme: Intx,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point for each group with the least squared error, among shares of the plain scale.

    ``importance``: a weight for each input feature (how much its squared error matters). The scale is tried as it
    will be stored, in the weight's own dtype.
    """
    import torch

    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    scale, zero_point = plain_scales(weight, scheme)
    grouped = weight.float().unflatten(1, (scale.shape[1], -1))
    cost = importance.float().view(1, scale.shape[1], -1) if importance is not None else None
    best = torch.full_like(scale, torch.inf, dtype=torch.float32)
    best_scale, best_zero = scale.clone(), zero_point.clone()
    middle = (low - zero_point.float()) * scale.float()
    together = _shares_at_once(weight)
    for first in range(0, len(_SHARES), together):
        share: Any = _SHARES[first]
        less: Any = 1 - share
        if together > 1:
            share, less = (each[first : first + together] for each in _shares_on(weight.device))
        tried = (scale.float() * share).to(scale.dtype)
        tried = torch.where(tried > 0, tried, scale)
        step = tried.float().unsqueeze(-1)
        zero = zero_point.expand_as(tried)
        if scheme.mapping == "asymmetric":
            # The range shrinks towards its middle, so the low end moves up by half of what is cut off.
            start = middle + less * scale.float() * (high - low) / 2
            zero = (low - start / tried.float()).round().clamp(low, high).to(zero_point.dtype)
        offset = zero.float().unsqueeze(-1)
        error = (
            ((grouped / step + offset).round().clamp(low, high) - offset).mul_(step).sub_(grouped).square_()
        )
        total = (error * cost if cost is not None else error).sum(-1)
        if together > 1:
            # Of equal ones the first.
            place = total.argmin(0, keepdim=True)
            total, tried, zero = (each.gather(0, place)[0] for each in (total, tried, zero))
        better = total < best
        best = torch.where(better, total, best)
        best_scale = torch.where(better, tried, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


@cache
def _shares_on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The shares, and what is left of 1, each (shares, 1, 1) float32; kept, since a copy to a GPU waits for it."""
    import torch

    shares = torch.tensor([_SHARES, [1 - share for share in _SHARES]], dtype=torch.float32, device=device)
    return shares[0, :, None, None], shares[1, :, None, None]


def _shares_at_once(weight: torch.Tensor) -> int:
    """A GPU waits for the starts of small kernels, so it tries several shares at once; a CPU's caches hold one."""
    return max(_TOGETHER // weight.numel(), 1) if weight.is_cuda else 1


def least_squares_weight(
    weight: torch.Tensor,
    scheme: Intx,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize ``weight`` with the scales of least squared error to torchao's tensor.

    ``importance``: as `least_squares_scales` takes it.
    """
    import torch

    if weight.is_meta:
        scale, zero_point = plain_scales(weight, scheme)
        return intx_tensor(torch.empty_like(weight, dtype=torch.int8), scale, zero_point, scheme)
    # The search holds a few float32 copies: rows are independent, so they go in blocks.
    rows = max(_BLOCK // weight.shape[1], 1)
    found = [least_squares_scales(part, scheme, importance) for part in weight.split(rows)]
    scale, zero_point = (torch.cat(each) for each in zip(*found, strict=True))
    return intx_tensor(round_to(weight, scale, zero_point, scheme), scale, zero_point, scheme)


def plain_weight(weight: torch.Tensor, scheme: Intx) -> torch.Tensor:
    """Quantize ``weight`` by plain rounding, equal to torchao's result in every bit."""
    scale, zero_point = plain_scales(weight, scheme)
    return intx_tensor(round_to(weight, scale, zero_point, scheme), scale, zero_point, scheme)


def round_to(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    scheme: Intx,
) -> torch.Tensor:
    """The integers of ``weight`` for given scales: torchao's `quantize_affine`, without its copies."""
    import torch

    values = weight.unflatten(1, (scale.shape[1], -1)) * (1.0 / scale).unsqueeze(-1)
    values.round_()
    if scheme.mapping == "asymmetric":
        values += zero_point.unsqueeze(-1)
    half = 2 ** (scheme.bits - 1)
    if half <= 8:
        # No value is beyond int8, even for scales of half the size, and bytes are clamped ten times as fast.
        return values.to(torch.int8).clamp_(-half, half - 1).flatten(1)
    return values.clamp_(-half, half - 1).to(torch.int8).flatten(1)

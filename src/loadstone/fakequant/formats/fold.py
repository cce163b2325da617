"""Fold: quantize and dequantize a weight, or a layer's input, in its own dtype."""

from __future__ import annotations

from collections.abc import Callable
from math import lcm

import torch

from loadstone.errors import ArtifactError
from loadstone.fakequant.formats import float8, fp4, integer
from loadstone.fakequant.formats.spec import (
    Float8,
    InputSpec,
    Integer,
    Mx,
    Nvfp4,
    Own,
    Staged,
    WeightSpec,
    misfit,
)
from loadstone.quantization.schemes import Recipe

# Values folded at once: bounds the float32 temporaries.
_CHUNK = 1 << 20


def fold(
    name: str, weight: torch.Tensor, spec: WeightSpec, *, amax: torch.Tensor | None = None
) -> torch.Tensor:
    """``weight`` rounded to ``spec`` and back, in its own dtype, on its own device.

    ``weight``: (out, in), or (experts, out, in), each expert on its own. ``amax``: largest magnitude of the
    whole weight for per-tensor scales, measured when not given. Raises `ArtifactError`, naming the tensor,
    for values that are not finite and for a shape that the format forbids.
    """
    if problem := misfit(spec, tuple(weight.shape)):
        raise ArtifactError(
            f"tensor '{name}' cannot be folded: {problem}", "Leave it out by a rule (format: none)"
        )
    if weight.numel() == 0:
        return weight
    if weight.dim() == 3:
        return torch.stack([fold(f"{name}[{i}]", expert, spec) for i, expert in enumerate(weight)])
    amax = _amax(name, weight) if amax is None else _checked_amax(name, amax)
    rows = weight.shape[0]
    if not isinstance(spec, Recipe):
        multiple = row_multiple(spec)
        rows = max(_CHUNK // (weight.shape[-1] * multiple), 1) * multiple
    return torch.cat([fold_rows(part, spec, amax) for part in weight.split(rows)])


def row_multiple(spec: WeightSpec) -> int:
    """Rows of a weight are folded independently in blocks of any multiple of this number; 0: only all at once."""
    match spec:
        case Float8(granularity="block", block=block):
            return block
        case Staged(stages=stages):
            return lcm(*(row_multiple(stage) for stage in stages))
        case Recipe() | Own():
            return 0
    return 1


def fold_rows(rows: torch.Tensor, spec: WeightSpec, amax: torch.Tensor | None = None) -> torch.Tensor:
    """Finite ``rows`` (n, in) of a weight rounded to ``spec`` and back, in their own dtype.

    ``amax``: largest magnitude of the whole weight, a float32 scalar; without it ``rows`` are the whole weight.
    """
    if isinstance(spec, Recipe):
        from loadstone.quantization.quantize import dense, quantize_weight

        return dense(quantize_weight(rows, spec.scheme)).to(rows.dtype)
    if isinstance(spec, Own):
        raise ValueError(f"a {spec.quantizer} folds its weight as the model is read")
    if amax is None:
        low, high = torch.aminmax(rows)
        amax = torch.maximum(low.abs(), high.abs()).float()
    return _step(spec, amax)(rows.float()).to(rows.dtype)


def _step(
    spec: Integer | Float8 | Nvfp4 | Mx | Staged, amax: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is done to some float32 rows of a weight whose largest magnitude is ``amax``."""
    match spec:
        case Integer(bits=bits, block=block):
            return lambda x: integer.fold_rows(x, bits, block)
        case Float8(granularity="tensor"):
            return lambda x: float8.fold_scaled(x, amax)
        case Float8(granularity="row"):
            return float8.fold_rows
        case Float8(block=block):
            return lambda x: float8.fold_squares(x, block)
        case Nvfp4():
            return lambda x: fp4.fold_nvfp4(x, amax)
        case Mx(bits=4):
            return fp4.fold_mxfp4
        case Mx():
            return fp4.fold_mxfp8
        case Staged(stages=stages):
            steps = [_step(stage, amax) for stage in stages]

            def in_order(x: torch.Tensor) -> torch.Tensor:
                for step in steps:
                    x = step(x)
                return x

            return in_order


def fold_input(x: torch.Tensor, spec: InputSpec, amax: torch.Tensor | None) -> torch.Tensor:
    """A layer's input (…, width) rounded as ``spec`` says, in its own dtype. ``amax``: scalar, for
    calibrated specs."""
    wide = x.float()
    match spec, amax:
        case "int8", torch.Tensor():
            folded = integer.fold_blocks(wide, 8, amax)
        case "fp8", torch.Tensor():
            folded = float8.fold_scaled(wide, amax)
        case "nvfp4", torch.Tensor():
            folded = fp4.fold_nvfp4(wide, amax)
        case "fp8-token", _:
            folded = float8.fold_rows(wide)
        case "mxfp8", _:
            folded = fp4.fold_mxfp8(wide)
        case "mxfp4", _:
            folded = fp4.fold_mxfp4(wide)
        case _:
            raise ValueError(f"{spec} needs an amax")
    return folded.to(x.dtype)


def _amax(name: str, weight: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(weight)
    amax = torch.maximum(low.abs(), high.abs()).float()
    if not bool(amax.isfinite()):
        raise ArtifactError(
            f"tensor '{name}' holds NaN or infinity and cannot be folded", "Use another checkpoint"
        )
    return amax


def _checked_amax(name: str, amax: torch.Tensor) -> torch.Tensor:
    amax = amax.float()
    if not bool((amax.isfinite() & (amax >= 0)).all()):
        raise ArtifactError(f"tensor '{name}': its amax is NaN, infinite or negative", "Calibrate again")
    return amax

"""Fold: quantize and dequantize a weight, or a layer's input, in its own dtype."""

from __future__ import annotations

import torch

from loadstone.errors import ArtifactError
from loadstone.fakequant.formats.spec import CALIBRATED, INPUTS, Own, WeightSpec, misfit
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
    if not isinstance(spec, Recipe | Own):
        rows = max(_CHUNK // (weight.shape[-1] * spec.row_multiple), 1) * spec.row_multiple
    return torch.cat([fold_rows(part, spec, amax) for part in weight.split(rows)])


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
    return spec.fold(rows.float(), amax).to(rows.dtype)


def fold_input(x: torch.Tensor, spec: str, amax: torch.Tensor | None) -> torch.Tensor:
    """A layer's input (…, width) rounded by the format ``spec`` of `INPUTS`, in its own dtype. ``amax``: scalar, for
    calibrated formats."""
    if amax is None:
        if spec in CALIBRATED:
            raise ValueError(f"{spec} needs an amax")
        amax = x.new_zeros(())
    return INPUTS[spec].fold(x.float(), amax).to(x.dtype)


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

"""GPTQ (https://arxiv.org/abs/2210.17323): round a weight column by column, correcting the others.

torchao's own prototype needs a GPU and covers other tensor classes; here the result is other integers and scales in the
class that plain rounding gives, so it loads everywhere alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loadstone.errors import ArtifactError
from loadstone.quantization.schemes import Intx

if TYPE_CHECKING:
    import torch

# Damping of the Hessian's diagonal, as a share of its mean: the paper's.
_DAMP = 0.01
# Columns whose errors are collected before the remaining columns are corrected.
_COLUMNS = 128


def gptq(weights: Sequence[torch.Tensor], hessian: torch.Tensor, scheme: Intx) -> list[torch.Tensor]:
    """Quantize ``weights`` (out, in), of one dtype, to torchao's tensors so that their products with inputs of second
    moment ``hessian`` (in, in) change least.

    Rows do not depend on each other: weights that share their inputs take one pass over the columns.
    """
    import torch

    from loadstone.quantization.rounding import intx_tensor, least_squares_scales

    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    # A copy.
    weight = torch.cat(list(weights))
    rest = weight.float()
    group = scheme.group_size or weight.shape[1]
    diagonal = hessian.diagonal().clone()
    inverse = _inverse_factor(hessian)
    one_group = replace(scheme, group_size=0)
    values = torch.empty_like(weight, dtype=torch.int8)
    scales, zeros = [], []
    if group == weight.shape[1]:
        found = least_squares_scales(weight, one_group, diagonal)
    for start in range(0, weight.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, weight.shape[1])
        errors = torch.zeros_like(rest[:, start:end])
        for column in range(start, end):
            if group < weight.shape[1] and column % group == 0:
                # The group's scale is chosen once the errors of earlier columns have reached it.
                last = min(column + group, end)
                late = rest[:, column : column + group].clone()
                if last < column + group:
                    late[:, last - column :] -= errors @ inverse[start:end, last : column + group]
                found = least_squares_scales(
                    late.to(weight.dtype), one_group, diagonal[column : column + group]
                )
            if column % group == 0:
                scales.append(found[0])
                zeros.append(found[1])
                scale, zero = found[0].float()[:, 0], found[1].float()[:, 0]
            rounded = (rest[:, column] / scale + zero).round().clamp(low, high)
            values[:, column] = rounded.to(torch.int8)
            # As the tensor dequantizes: in the weight's own dtype.
            back = ((rounded - zero) * scale).to(weight.dtype).float()
            error = (rest[:, column] - back) / inverse[column, column]
            rest[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    rows = [len(each) for each in weights]
    parts = [part.split(rows) for part in (values, torch.cat(scales, 1), torch.cat(zeros, 1))]
    return [intx_tensor(value, scale, zero, scheme) for value, scale, zero in zip(*parts, strict=True)]


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    import torch

    damped = hessian.double().clone()
    dead = damped.diagonal() == 0
    damped.diagonal()[dead] = 1
    mean = damped.diagonal().mean()
    for attempt in range(6):
        damped.diagonal().add_(_DAMP * mean * 10**attempt)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper.float()
    raise ArtifactError(
        "the calibration text gives a Hessian that cannot be inverted", "Use more or other text"
    )

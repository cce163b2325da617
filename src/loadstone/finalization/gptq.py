"""GPTQ (https://arxiv.org/abs/2210.17323): round a weight column by column, correcting the others.

torchao's own prototype needs a GPU and covers other tensor classes; here the result is other integers and scales in the
class that plain rounding gives, so it loads everywhere alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from loadstone.errors import ArtifactError
from loadstone.finalization.columns import Block, round_columns
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

    # A copy.
    weight = torch.cat(list(weights))
    rest, width = weight.float(), weight.shape[1]
    group = scheme.group_size or width
    diagonal = hessian.diagonal().clone()
    inverse = _inverse_factor(hessian)
    one_group = replace(scheme, group_size=0)
    values = torch.empty_like(weight, dtype=torch.int8)
    rounder = round_columns
    if weight.is_cuda and find_spec("triton") is not None:
        from loadstone.finalization import columns_kernel

        rounder = columns_kernel.round_columns
    scales, zeros = [], []
    if group == width:
        found = least_squares_scales(weight, one_group, diagonal)
    for start in range(0, width, _COLUMNS):
        end = min(start + _COLUMNS, width)
        errors = torch.zeros_like(rest[:, start:end])
        # The factor comes column by column.
        own = inverse[start:end, start:end].contiguous()
        block = Block(rest, own, errors, values, start, end, scheme.bits, weight.dtype)
        first = start
        while first < end:
            last = min(first - first % group + group, end)
            if first % group == 0:
                if group < width:
                    # The group's scale is chosen once the errors of earlier columns have reached it.
                    late = rest[:, first : first + group].clone()
                    if last < first + group:
                        late[:, last - first :] -= errors @ inverse[start:end, last : first + group]
                    found = least_squares_scales(
                        late.to(weight.dtype), one_group, diagonal[first : first + group]
                    )
                scales.append(found[0])
                zeros.append(found[1])
            rounder(block, first, last, *found)
            first = last
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

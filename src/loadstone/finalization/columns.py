"""The columns of a weight that `gptq` rounds one after the other, by torch; `columns_kernel` does so on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Block:
    """Columns ``start`` … ``end`` - 1 of a weight while they are rounded.

    float32: ``rest`` (out, in), what is left to round; ``inverse``, these columns and rows of the inverse factor of the
    inputs' second moment; ``errors`` (out, end - start), to correct later blocks with. ``values`` (out, in): the int8
    integers, of ``bits``. ``dtype``: the weight's own.
    """

    rest: torch.Tensor
    inverse: torch.Tensor
    errors: torch.Tensor
    values: torch.Tensor
    start: int
    end: int
    bits: int
    dtype: torch.dtype


def round_columns(block: Block, first: int, last: int, scale: torch.Tensor, zero: torch.Tensor) -> None:
    """Round columns ``first`` … ``last`` - 1 with a scale and a zero point for each row (out, 1), one after the other;
    each column's error corrects the later ones of the block."""
    rest, inverse, start, end = block.rest, block.inverse, block.start, block.end
    low, high = -(2 ** (block.bits - 1)), 2 ** (block.bits - 1) - 1
    scale, zero = scale.float()[:, 0], zero.float()[:, 0]
    for column in range(first, last):
        rounded = (rest[:, column] / scale + zero).round().clamp(low, high)
        block.values[:, column] = rounded.to(block.values.dtype)
        # As the tensor dequantizes: in the weight's own dtype.
        back = ((rounded - zero) * scale).to(block.dtype).float()
        error = (rest[:, column] - back) / inverse[column - start, column - start]
        rest[:, column:end] -= error[:, None] * inverse[column - start, column - start :]
        block.errors[:, column - start] = error

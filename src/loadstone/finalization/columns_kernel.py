"""The Triton kernel of GPTQ: torch takes sixteen kernels for a column, which take longer to start than to run.

The same operations in the same order, so the same bits: divisions are IEEE's, and no product is fused with a sum.
Importing this module needs Triton, which comes with CUDA builds of torch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from loadstone.finalization.columns import Block

# Rows of a program: those of one warp each, whose sums over columns stay within the warp.
_ROWS, _WARPS = 8, 4


@triton.jit(do_not_specialize=["rows", "width", "start", "size", "first", "last"])
def _columns_kernel(
    rest, inverse, errors, values, scale, zero, rows, width, start, size, first, last,
    LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``first`` and ``last`` count from ``start``, the first of the block's ``size`` columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    block = inside[:, None] & ((column >= first) & (column < size))[None, :]
    place = row.to(tl.int64)[:, None] * width + (start + column)[None, :]
    left = tl.load(rest + place, mask=block, other=0.0)
    step = tl.load(scale + row, mask=inside, other=1.0).to(tl.float32)
    offset = tl.load(zero + row, mask=inside, other=0).to(tl.float32)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    wrong = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(first, last):
        here = (column == at)[None, :]
        factors = tl.load(inverse + at * size + column, mask=(column >= at) & (column < size), other=0.0)
        value = tl.sum(tl.where(here, left, 0.0), 1)
        # Adding 1.5 * 2^23 leaves no fraction: rounded half to even. Larger values are clamped.
        rounded = (tl.div_rn(value, step) + offset + 12582912.0) - 12582912.0
        rounded = tl.minimum(tl.maximum(rounded, LOW), HIGH)
        back = ((rounded - offset) * step).to(scale.dtype.element_ty).to(tl.float32)
        error = tl.div_rn(value - back, tl.load(inverse + at * size + at))
        left -= error[:, None] * factors[None, :]
        found = tl.where(here, rounded[:, None], found)
        wrong = tl.where(here, error[:, None], wrong)
    tl.store(rest + place, left, mask=block)
    done = block & (column < last)[None, :]
    tl.store(values + place, found.to(tl.int8), mask=done)
    tl.store(errors + row.to(tl.int64)[:, None] * size + column[None, :], wrong, mask=done)


def round_columns(block: Block, first: int, last: int, scale: torch.Tensor, zero: torch.Tensor) -> None:
    """As `columns.round_columns`; ``scale`` is of the weight's own dtype."""
    (rows, width), start = block.rest.shape, block.start
    high = 2 ** (block.bits - 1) - 1
    _columns_kernel[(triton.cdiv(rows, _ROWS),)](
        block.rest, block.inverse, block.errors, block.values, scale.contiguous(), zero.contiguous(),
        rows, width, start, block.end - start, first - start, last - start,
        LOW=-high - 1, HIGH=high, ROWS=_ROWS, COLUMNS=triton.next_power_of_2(block.end - start),
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip

"""The Triton kernel of `few_rows`: products of one or a few rows with a quantized weight, as fast as it can be read.

Importing this module needs Triton, which comes with CUDA builds of torch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton


@triton.jit
def _bytes_kernel(x, weight, scale, out, outputs, inputs, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One byte a value and a scale for each row: int8, float8."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1)
    inside = n < outputs
    start = weight + n.to(tl.int64)[:, None] * inputs
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for at in range(0, inputs, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        w = tl.load(start + k[None, :], mask=inside[:, None] & (k < inputs)[None, :], other=0.0)
        values = tl.load(x + row * inputs + k, mask=k < inputs, other=0.0)
        sums += w.to(tl.float32) * values.to(tl.float32)[None, :]
    result = tl.sum(sums, 1) * tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + n, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _nibbles_kernel(
    x, weight, scale, zero, out, outputs, inputs,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Four bits a value, (q - 8) · scale + zero in groups of 8 · WORDS, packed as `few_rows.pack_nibbles` does.

    Four bits in the mantissa of 1.0 make 1 + q / 16 without a conversion, of which a GPU does few at a time.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1)
    inside = n < outputs
    words, groups = inputs // 8, inputs // (8 * WORDS)
    start = weight + n.to(tl.int64)[:, None] * words
    scales = n.to(tl.int64)[:, None] * groups
    sums = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    for at in range(0, groups, GROUPS):
        b = at * WORDS + tl.arange(0, GROUPS * WORDS)
        g = at + tl.arange(0, GROUPS)
        first = x + row * inputs + (b // WORDS) * (8 * WORDS) + b % WORDS
        w = tl.load(start + b[None, :], mask=inside[:, None] & (b < words)[None, :], other=0)
        products = tl.zeros([BLOCK_N, GROUPS * WORDS], tl.float32)
        total = tl.zeros([GROUPS * WORDS], tl.float32)
        for i in tl.static_range(8):
            values = tl.load(first + i * WORDS, mask=b < words, other=0.0).to(tl.float32)
            bits = (w << (19 - 4 * i)) if 4 * i < 19 else (w >> (4 * i - 19))
            shifted = ((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)
            products += shifted * values[None, :]
            total += values
        of_inputs = tl.sum(tl.reshape(total, [GROUPS, WORDS]), 1)
        in_group = tl.sum(tl.reshape(products, [BLOCK_N, GROUPS, WORDS]), 2)
        there = inside[:, None] & (g < groups)[None, :]
        factor = tl.load(scale + scales + g[None, :], mask=there, other=0.0).to(tl.float32)
        sums += (in_group - 1.5 * of_inputs[None, :]) * (16.0 * factor)
        if HAS_ZERO:
            offset = tl.load(zero + scales + g[None, :], mask=there, other=0.0).to(tl.float32)
            sums += of_inputs[None, :] * offset
    tl.store(out + row * outputs + n, tl.sum(sums, 1).to(out.dtype.element_ty), mask=inside)


@triton_op("loadstone::bytes_product", mutates_args={})
def bytes_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(rows, in) · (out, in) int8 or float8, scaled by (out,) -> (rows, out) in the dtype of ``x``."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = x.new_empty(rows, outputs)
    block_n, block_k, warps = _TALL if outputs > _TALL_OUTPUTS else _BYTES
    wrap_triton(_bytes_kernel)[(triton.cdiv(outputs, block_n), rows)](
        x, weight, scale, out, outputs, inputs, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps
    )
    return out


@triton_op("loadstone::nibbles_product", mutates_args={})
def nibbles_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """(rows, in) · (out, in / 8) int32, with scales and zeros (out, groups) -> (rows, out) in the dtype of ``x``."""
    rows, inputs = x.shape
    outputs, groups = scale.shape
    out = x.new_empty(rows, outputs)
    block_n, values, warps = _NIBBLES
    group = inputs // groups
    wrap_triton(_nibbles_kernel)[(triton.cdiv(outputs, block_n), rows)](
        x, weight, scale, scale if zero is None else zero, out, outputs, inputs,
        WORDS=group // 8, GROUPS=max(values // group, 1), HAS_ZERO=zero is not None,
        BLOCK_N=block_n, num_warps=warps,
    )  # fmt: skip
    return out


# Rows and values of a block, and warps: the fastest of those tried on an H200 (tests/bench/gpu_decode.py --kernels).
_BYTES = (2, 2048, 4)
_TALL = (4, 512, 2)
_TALL_OUTPUTS = 8192
_NIBBLES = (8, 2048, 4)

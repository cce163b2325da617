"""Rows of a packed weight as plain numbers, from the stored tensors that they need, for every format that is read.

Each format is decoded as its own library does it, in the same dtypes and order, so that the same bits come out:
float8 in float32 (transformers' `Fp8Dequantize`), MXFP4 exactly (`convert_moe_packed_tensors`), NVFP4 of ModelOpt in
float32, GPTQ and AWQ in the dtype of their scales, bitsandbytes' blocks in float32 and then in the dtype that was
quantized. The result is rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from loadstone.artifact.compressed_tensors import LayerScheme, PackedWeight
from loadstone.artifact.compressed_tensors.scheme import AWQ, FP4, FP8, GPTQ, LLM_INT8, MXFP4, NF4, NVFP4
from loadstone.artifact.packed import Packed
from loadstone.artifact.packed.bitsandbytes import BlockwiseWeight
from loadstone.artifact.packed.weight import StoredWeight, misfit
from loadstone.artifact.torchao.flatten import torch_dtype
from loadstone.quantization.packing import (
    decode_e2m1,
    decode_e8m0,
    decode_float8,
    decode_nibbles,
    decode_rows,
    scaled,
    unpack_ints,
)

if TYPE_CHECKING:
    import torch

# Weights that are decoded at once where a format keeps all rows together.
_BLOCK = 1 << 22
# Where AWQ puts each of eight neighbours in a word: value j is nibble _AWQ_NIBBLE[j].
_AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
# bitsandbytes' numbers of 4 bits, by code (`functional.get_4bit_type`), and what it multiplies int8 by for 1 / 127.
_TABLES = {
    NF4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    FP4: tuple(sign * each / 12 + 0.0 for sign in (1, -1) for each in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip
_PER_127 = 7.874015718698502e-3


def decode_block(weight: Packed, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Rows (rows, in) of ``weight`` in ``dtype``. ``parts``: by suffix, cut as `Packed.rows_needed` says."""
    scheme, columns = weight.scheme, weight.shape[-1]
    if isinstance(weight, PackedWeight):
        return decode_rows(scheme, dict(parts), columns, dtype, weight.padded)
    if scheme.format == FP8:
        return _fp8(scheme, parts, dtype)
    if scheme.format == NVFP4:
        values = decode_e2m1(parts["weight_packed"], _float32())
        factors = parts["weight_scale"].float() * parts["weight_scale_2"].reshape(())
        return scaled(values, factors, None, scheme.weights, None).to(dtype)
    if scheme.format == MXFP4 and len(weight.shape) == 3:
        return _mxfp4_experts(weight, parts, dtype)
    if scheme.format == MXFP4:
        return decode_rows(scheme, dict(parts), columns, dtype)
    if isinstance(weight, BlockwiseWeight):
        return _blockwise(weight, parts, dtype)
    if scheme.format == LLM_INT8:
        return _int8_rows(weight, parts, dtype)
    return _integers(weight, parts, dtype)


def _float32() -> torch.dtype:
    import torch

    return torch.float32


def _fp8(scheme: LayerScheme, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """float8 values (…, rows, columns) times the scale of their block, row or tensor."""
    values, scale = decode_float8(parts["weight"], _float32()), parts["weight_scale"]
    scale = scale.float() if scale.element_size() > 1 else decode_e8m0(scale, _float32())
    *experts, rows, columns = values.shape
    sizes = {"channel": (1, columns), "tensor": (rows, columns)}
    high, wide = scheme.weights.block or sizes[scheme.weights.strategy]
    grid = scale.reshape(*experts, -(-rows // high), -(-columns // wide))
    if rows % high or columns % wide:
        grid = grid.repeat_interleave(high, -2)[..., :rows, :].repeat_interleave(wide, -1)[..., :columns]
        values.mul_(grid)
    else:
        blocks = values.view(*experts, rows // high, high, columns // wide, wide)
        blocks.mul_(grid[..., :, None, :, None])
    return values.to(dtype).view(-1, columns)


def _mxfp4_experts(weight: Packed, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Whole experts: blocks (experts, out, groups, 16) and scales (experts, out, groups) to (experts * in, out)."""
    blocks, scale = parts["weight_packed"], parts["weight_scale"]
    experts, out, groups, _ = blocks.shape
    flat = {"weight_packed": blocks.reshape(experts * out, -1), "weight_scale": scale.reshape(-1, groups)}
    rows = decode_rows(weight.scheme, flat, weight.shape[1], dtype)
    return rows.view(experts, out, -1).transpose(1, 2).reshape(-1, out)


def _blockwise(
    weight: BlockwiseWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Values of a table times the factor of their block; blocks go on from one row to the next."""
    import torch

    packed, table = parts["weight_packed"].view(torch.uint8).view(1, -1), _TABLES[weight.scheme.format]
    if (parts["quant_map"].float() - torch.tensor(table, device=packed.device)).abs().max() > 1e-3:
        raise misfit(weight.parts["quant_map"], f"is not the table of {weight.scheme.format.upper()}")
    factors = parts["weight_scale"]
    if weight.nested_size:
        factors = parts["nested_map"].float().index_select(0, factors.int())
        factors = _times_blocks(factors, parts["nested_scale"], weight.nested_size) + weight.offset
    columns = weight.shape[-1]
    values = decode_nibbles(packed, table, torch.float32, high_first=True).flatten()
    values = _times_blocks(
        values[: len(values) // columns * columns], factors, weight.scheme.weights.group_size or 1
    )
    return values.view(-1, columns).to(torch_dtype(weight.rounded)).to(dtype)


def _times_blocks(values: torch.Tensor, factors: torch.Tensor, size: int) -> torch.Tensor:
    """``values``, of which ``size`` after each other share a factor, times these; the last block may be shorter."""
    whole = len(values) // size
    values[: whole * size].view(whole, size).mul_(factors[:whole].float().unsqueeze(1))
    values[whole * size :].mul_(factors[whole:].float())
    return values


def _int8_rows(weight: StoredWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """int8 values times the largest magnitude of their row, in float32."""
    if "weight_format" in parts and bool(parts["weight_format"].any()):
        raise misfit(
            weight.parts["weight_format"], "names another order of values than rows, of an old release"
        )
    return (parts["weight"] * parts["weight_scale"].float().view(-1, 1) * _PER_127).to(dtype)


def _integers(weight: Packed, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All rows of a GPTQ or AWQ weight, some at a time: ``(value - zero point) * scale`` in the scales' dtype."""
    import torch

    scheme, (rows, columns) = weight.scheme, weight.shape
    packed, scale, zeros = parts["weight_packed"], parts["weight_scale"], parts["weight_zero_point"]
    bits = scheme.weights.bits
    order = _column_groups(weight, parts.get("weight_g_idx"), scale.shape[0])
    unpack: Callable[[torch.Tensor, int], torch.Tensor] = _unpack_awq
    if scheme.format == AWQ:
        points = _unpack_awq(zeros, rows).t()
    else:
        points = unpack_ints(zeros, bits, rows).t()
        if scheme.format == GPTQ:
            # Stored less one; a value of 0 was stored as the largest.
            half = 1 << (bits - 1)
            points = (((points.to(torch.int16) + half + 1) & (2 * half - 1)) - half).to(torch.int8)
    result = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    # Words are cut where whole ones hold whole rows.
    step = max(_BLOCK // columns // 32, 1) * 32
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if scheme.format == AWQ:
            words = packed[:, start * bits // 32 : -(-stop * bits // 32)]
            values = unpack(words, stop - start).t()
        else:
            values = unpack_ints(packed[:, start:stop].t(), bits, columns)
        numbers = values.to(scale.dtype, memory_format=torch.contiguous_format)
        cut = scale[:, start:stop].t()
        result[start:stop] = scaled(numbers, cut, points[start:stop], scheme.weights, order)
    return result


def _unpack_awq(packed: torch.Tensor, count: int) -> torch.Tensor:
    """int8 values less 8, (rows, count), out of AWQ's words (rows, count / 8)."""
    import torch

    values = unpack_ints(packed.contiguous(), 4, packed.shape[1] * 8)
    order = torch.tensor(_AWQ_NIBBLE, device=packed.device)
    return values.unflatten(1, (-1, 8)).index_select(2, order).flatten(1)[:, :count]


def _column_groups(weight: Packed, order: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """The group of each column, None where they follow each other; raises `ArtifactError` for one that is not there."""
    import torch

    if order is None:
        return None
    if bool(((order < 0) | (order >= groups)).any()):
        raise misfit(weight.parts["weight_g_idx"], f"names a group that is not among {groups}")
    columns = weight.shape[-1]
    size = weight.scheme.weights.group_size or columns
    plain = torch.arange(columns, device=order.device) // size
    return None if torch.equal(order.long(), plain) and columns % size == 0 else order

"""Integers and small floats as the compressed-tensors layout stores them: packed, unpacked and decoded, rows by rows.

Every function takes rows of a weight that can be cut anywhere (see `row_tile`), on any device. Decoding does what
compressed-tensors' own decompressor does in the same order, so that the same bits come out.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from loadstone.artifact.compressed_tensors.scheme import MXFP4, MXFP8, NVFP4, PACK, LayerScheme, QuantArgs
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    import torch

# The magnitudes of e2m1, by code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Steps of float32 tried around the reciprocal of a scale.
_NEIGHBOURS = 16


def pack_ints(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 values (rows, K) of 4 or 8 bits as int32 words (rows, ceil(K * bits / 32)).

    Value i of a row is stored plus ``2 ** (bits - 1)`` at bits ``i * bits`` and up of the row. What the last word has
    left over is zero.
    """
    import torch

    rows, columns = values.shape
    stored = torch.empty(rows, columns + -columns % (32 // bits), dtype=torch.uint8, device=values.device)
    stored[:, columns:] = 0
    torch.add(values.view(torch.uint8), 1 << (bits - 1), out=stored[:, :columns])
    if bits == 4:
        # Two values side by side are one int16: no strided copies.
        pairs = stored.view(torch.int16)
        stored = (pairs | (pairs >> 4)).to(torch.uint8)
    return stored.view(torch.int32)


def unpack_ints(packed: torch.Tensor, bits: int, columns: int, padded: bool = False) -> torch.Tensor:
    """int8 values (rows, columns) out of int32 words (rows, words), 1 to 8 bits each.

    ``padded``: a word holds ``32 // bits`` values only (compressed-tensors before 0.18), else values straddle words.
    """
    import torch

    if packed.stride(-1) != 1:
        # Not `contiguous`: of a single column that changes nothing.
        packed = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device).copy_(packed)
    if bits == 8:
        return (packed.view(torch.uint8)[:, :columns] ^ 0x80).view(torch.int8)
    if bits == 4:
        # In place: memory that is used for the first time costs more than the arithmetic.
        both = packed.view(torch.uint8).to(torch.int16)
        both |= both << 4
        both &= 0x0F0F
        both.view(torch.int8).sub_(8)
        return both.view(torch.int8)[:, :columns]
    index = torch.arange(columns, device=packed.device)
    per_word = 32 // bits
    starts = index // per_word * 32 + index % per_word * bits if padded else index * bits
    unsigned = packed.to(torch.int64) & 0xFFFFFFFF
    after = torch.nn.functional.pad(unsigned, (0, 1))
    word, shift = starts // 32, starts % 32
    pairs = (unsigned[:, word] >> shift) | (after[:, word + 1] << (32 - shift))
    return ((pairs & ((1 << bits) - 1)) - (1 << (bits - 1))).to(torch.int8)


def pack_zero_points(zero_points: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 zero points (rows, groups) as int32 words (ceil(rows * bits / 32), groups): packed along the rows."""
    return pack_ints(zero_points.t(), bits).t().contiguous()


def unpack_zero_points(packed: torch.Tensor, bits: int, rows: int, padded: bool = False) -> torch.Tensor:
    """int8 zero points (rows, groups), the inverse of `pack_zero_points` for 1 to 8 bits."""
    return unpack_ints(packed.t(), bits, rows, padded).t()


def decode_e2m1(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers (rows, K) of ``dtype`` that bytes (rows, K / 2) hold, two each, the first in the low bits."""
    return decode_nibbles(packed, (*_E2M1, *(-value for value in _E2M1)), dtype)


def decode_nibbles(
    packed: torch.Tensor, numbers: tuple[float, ...], dtype: torch.dtype, *, high_first: bool = False
) -> torch.Tensor:
    """For both nibbles of each byte (rows, bytes), the low one first, the one of 16 ``numbers`` that it stands for."""
    return _look_up(packed, _nibble_table(numbers, dtype, high_first))


@cache
def _nibble_table(numbers: tuple[float, ...], dtype: torch.dtype, high_first: bool) -> torch.Tensor:
    """The numbers of all nibbles of one or two bytes, which fill eight bytes: (65536, 4) or (256, 2)."""
    import torch

    order = torch.arange(8 // dtype.itemsize, device="cpu")
    codes = torch.arange(16 ** len(order), device="cpu").unsqueeze(1) >> 4 * (order ^ high_first)
    return torch.tensor(numbers, dtype=dtype, device="cpu")[codes & 0xF]


def _look_up(stored: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Bytes (rows, n) decoded by a table (256, k) of a byte's numbers, or (65536, k) of those of two bytes."""
    import numpy
    import torch

    one = len(table) == 256
    words = table.view({4: torch.int32, 8: torch.int64}[table.shape[1] * table.itemsize]).flatten()
    if stored.is_cpu:
        indices = stored.contiguous().view(torch.uint8 if one else torch.uint16)
        # It writes the result and little else: memory used for the first time takes longer than arithmetic.
        result = torch.empty(stored.shape[0], table.shape[1] * indices.shape[1], dtype=table.dtype)
        numpy.take(words.numpy(), indices.numpy(), out=result.view(words.dtype).numpy(), mode="clip")
        return result
    # torch has few operations on uint16 there.
    codes = stored.contiguous().view(torch.uint8 if one else torch.int16).flatten().to(torch.int32) & 0xFFFF
    found = words.to(stored.device).index_select(0, codes)
    return found.view(table.dtype).view(stored.shape[0], -1)


def round_e2m1(x: torch.Tensor, *, ties_to_even: bool) -> torch.Tensor:
    """The nearest of 0, ±0.5, ±1, ±1.5, ±2, ±3, ±4, ±6; a tie goes to the even code, or towards zero."""
    import torch

    magnitude = x.abs()
    # The grid is even within each power of two, so a whole number of steps is all there is to round.
    # Cast: of two Python numbers `where` makes a tensor of the process's default dtype.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    steps = magnitude / step
    steps = steps.round_() if ties_to_even else (steps - 0.5).ceil_().clamp_(min=0)
    return steps.mul_(step).clamp_(max=6.0).copysign_(x)


def decode_float8(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float8 values in ``dtype``: by table on a CPU, where torch's own conversion takes many times as long."""
    import torch

    if not values.is_cpu or values.numel() % 2:
        return values.to(dtype)
    stored = values.contiguous().view(torch.uint8).view(1, -1)
    return _look_up(stored, _float8_table(values.dtype, dtype)).view(values.shape)


@cache
def _float8_table(stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of all pairs of float8 values, (65536, 2)."""
    import torch

    numbers = torch.arange(256, dtype=torch.uint8, device="cpu").view(stored).to(dtype)
    return torch.stack((numbers.repeat(256), numbers.repeat_interleave(256)), -1)


def decode_e8m0(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The powers of two that bytes stand for: ``2 ** (byte - 127)``."""
    import torch

    exponents = scale.view(torch.uint8).to(torch.float32) - 127
    return torch.exp2(exponents).to(dtype)


def plain_block_scales(swizzled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Scales (rows, columns) in row-major order out of the tiles of 128 x 4 in which torchao stores them."""
    tiles = swizzled.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4).transpose(2, 3)
    plain = tiles.reshape(-(-rows // 128), -(-columns // 4), 128, 4).transpose(1, 2)
    return plain.reshape(-(-rows // 128) * 128, -1)[:rows, :columns].contiguous()


def scale_as_divisor(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The float32 number that divides block scales of NVFP4, where torchao multiplies them by ``scale``.

    It is the one nearest to ``1 / scale`` with which every weight decodes to the same number of ``dtype``. For one
    scale in some ten thousand (and most in float32) there is none: then it is the one whose own reciprocal is
    ``scale``, and a few weights differ in their last bit.
    """
    import torch

    scale = scale.detach().float().reshape(1).cpu()
    if not scale.item():
        # A weight of zeros: every number does.
        return torch.ones(1)
    blocks = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().unsqueeze(1)
    numbers = torch.tensor(_E2M1)
    wanted = ((blocks * scale) * numbers).to(dtype)
    tried = 1.0 / scale
    steps = sorted(range(-_NEIGHBOURS, _NEIGHBOURS + 1), key=abs)
    near = [(tried.view(torch.int32) + step).view(torch.float32) for step in steps]
    exact = (each for each in near if torch.equal(((blocks / each) * numbers).to(dtype), wanted))
    back = (each for each in near if torch.equal(1.0 / each, scale))
    return next(exact, next(back, tried))


def input_divisor(largest: float) -> torch.Tensor:
    """The float32 number (1,) that NVFP4 inputs of that ``largest`` magnitude are scaled by: the block scale of the
    largest becomes 448. As compressed-tensors computes it."""
    import torch

    amax = torch.tensor([largest]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(448.0 * 6.0 / amax, posinf=1.0)


def scales_in(scale: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Scales in the model's ``dtype``; raises `ArtifactError` naming the tensor where that would change one.

    compressed-tensors computes in the dtype of the scales, and transformers casts stored float32 scales to the
    model's dtype: only scales of that dtype mean the same to all.
    """
    import torch

    cast = scale.to(dtype)
    if not torch.equal(cast.to(scale.dtype), scale):
        raise ArtifactError(
            f"tensor '{name}': its scales have more bits than {str(dtype).removeprefix('torch.')}, "
            "in which this model computes",
            "Finalize the unquantized model again",
        )
    return cast


def decode_rows(
    scheme: LayerScheme,
    parts: dict[str, torch.Tensor],
    columns: int,
    dtype: torch.dtype,
    padded: bool = False,
) -> torch.Tensor:
    """Rows (rows, columns) of a weight in ``dtype`` from the rows of its stored tensors that they need.

    ``parts``: by suffix (``weight_packed``, ``weight_scale``, …), cut as `rows_needed` says.
    """
    import torch

    scale = parts["weight_scale"]
    if scheme.format == NVFP4:
        values = decode_e2m1(parts["weight_packed"], torch.float32)
        factors = scale.float() / parts["weight_global_scale"].float().reshape(())
        return scaled(values, factors, None, scheme.weights, None).to(dtype)
    if scheme.format in (MXFP4, MXFP8):
        # Products with powers of two are exact, in whatever dtype holds the range.
        wide = torch.float32 if dtype == torch.float16 else dtype
        packed = scheme.format == MXFP4
        values = decode_e2m1(parts["weight_packed"], wide) if packed else decode_float8(parts["weight"], wide)
        return scaled(values, decode_e8m0(scale, wide), None, scheme.weights, None).to(dtype)
    zeros = parts.get("weight_zero_point") if not scheme.weights.symmetric else None
    if scheme.format == PACK:
        packed_values, bits = parts["weight_packed"], scheme.weights.bits
        if (
            packed_values.is_cpu
            and bits == 4
            and 8 * packed_values.shape[1] == columns
            and scale.itemsize in (2, 4)
        ):
            values = decode_nibbles(packed_values.view(torch.uint8), tuple(range(-8, 8)), scale.dtype)
        else:
            values = unpack_ints(packed_values, bits, columns, padded).to(scale.dtype)
        if zeros is not None and scheme.weights.strategy != "tensor":
            zeros = unpack_zero_points(zeros, bits, packed_values.shape[0], padded)
    elif scheme.weights.type == "float":
        values = decode_float8(parts["weight"], scale.dtype)
    else:
        values = parts["weight"].to(scale.dtype)
    return scaled(values, scale, zeros, scheme.weights, parts.get("weight_g_idx")).to(dtype)


def scaled(
    values: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    weights: QuantArgs,
    group_of_column: torch.Tensor | None,
) -> torch.Tensor:
    """``(values - zeros) * scale`` in place, each scale for its row, group or block."""
    rows, columns = values.shape
    zeros = zeros.to(scale.dtype) if zeros is not None else None
    if weights.strategy == "tensor":
        grids, target = [each if each is None else each.reshape(()) for each in (zeros, scale)], values
    elif weights.strategy == "block":
        assert weights.block is not None
        high, wide = weights.block
        grids = [
            each
            if each is None
            else each.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
            for each in (zeros, scale)
        ]
        target = values
    elif weights.grouped:
        grids, target = _by_group(values, scale, zeros, weights.group_size or columns, group_of_column)
    else:
        grids, target = [each if each is None else each.reshape(rows, 1) for each in (zeros, scale)], values
    if grids[0] is not None:
        target.sub_(grids[0])
    assert grids[1] is not None
    target.mul_(grids[1])
    return values


def _by_group(
    values: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    group: int,
    group_of_column: torch.Tensor | None,
) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    columns = values.shape[1]
    if group_of_column is not None and bool((group_of_column >= 0).all()):
        order = group_of_column.long()
        return [each if each is None else each[:, order] for each in (zeros, scale)], values
    if columns % group:
        return [
            each if each is None else each.repeat_interleave(group, 1)[:, :columns] for each in (zeros, scale)
        ], values
    return [each if each is None else each.unsqueeze(-1) for each in (zeros, scale)], values.view(
        values.shape[0], -1, group
    )

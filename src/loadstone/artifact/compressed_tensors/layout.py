"""Which tensors hold a weight of each scheme: names, dtypes, shapes, and the rows of each that rows of the weight need.

``N`` rows (output features) and ``K`` columns (input features) are the weight's own. Names are ``P.weight_packed`` and
the like, where ``P`` is the module's name in the source checkpoint (of each expert, where there are experts).
"""

from __future__ import annotations

from typing import NamedTuple

from loadstone.artifact.compressed_tensors.scheme import MXFP4, MXFP8, NVFP4, PACK, LayerScheme, QuantArgs
from loadstone.artifact.formats.safetensors import DTYPE_BITS


class Stored(NamedTuple):
    """dtype (in safetensors' spelling) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = DTYPE_BITS[self.dtype] // 8
        for side in self.shape:
            size *= side
        return size


def stored_tensors(scheme: LayerScheme, rows: int, columns: int, dtype: str) -> dict[str, Stored]:
    """What is written for a weight (rows, columns) of a model that computes in ``dtype`` (``BF16``), by suffix."""
    weights, zero_points = scheme.weights, {}
    grid = scale_grid(weights, rows, columns)
    if scheme.format == PACK:
        bits = weights.bits
        if not weights.symmetric:
            zero_points = {"weight_zero_point": Stored("I32", (words(rows, bits), grid[-1]))}
        return {
            "weight_packed": Stored("I32", (rows, words(columns, bits))),
            "weight_scale": Stored(dtype, grid),
            "weight_shape": Stored("I64", (2,)),
        } | zero_points
    if scheme.format == NVFP4:
        found = {
            "weight_packed": Stored("U8", (rows, columns // 2)),
            "weight_scale": Stored("F8_E4M3", grid),
            "weight_global_scale": Stored("F32", (1,)),
        }
        return found | ({"input_global_scale": Stored("F32", (1,))} if scheme.inputs else {})
    if scheme.format == MXFP4:
        return {"weight_packed": Stored("U8", (rows, columns // 2)), "weight_scale": Stored("U8", grid)}
    if scheme.format == MXFP8:
        return {"weight": Stored("F8_E4M3", (rows, columns)), "weight_scale": Stored("U8", grid)}
    if not weights.symmetric:
        zero_points = {"weight_zero_point": Stored("I8", grid)}
    values = "F8_E4M3" if weights.type == "float" else "I8"
    scale = "F32" if weights.strategy == "tensor" else dtype
    return {"weight": Stored(values, (rows, columns)), "weight_scale": Stored(scale, grid)} | zero_points


def scale_grid(weights: QuantArgs, rows: int, columns: int) -> tuple[int, ...]:
    """Shape of a weight's scales."""
    if weights.strategy == "tensor":
        return (1,)
    if weights.strategy == "block":
        assert weights.block is not None
        return -(-rows // weights.block[0]), -(-columns // weights.block[1])
    return rows, -(-columns // (weights.group_size or columns))


def words(count: int, bits: int, padded: bool = False) -> int:
    """int32 words that ``count`` values of ``bits`` fill. ``padded``: none straddles two words (before 0.18)."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


def row_tile(scheme: LayerScheme) -> int:
    """Rows of a weight can be packed and decoded apart from the others in multiples of this."""
    weights = scheme.weights
    if weights.block is not None and weights.strategy == "block":
        return weights.block[0]
    if scheme.format == PACK and not weights.symmetric and weights.strategy != "tensor":
        # Zero points of one column share words: 32 rows fill whole ones whatever the width, 320 also padded ones.
        return 32 // weights.bits if weights.bits in (1, 2, 4, 8) else 32 * (32 // weights.bits)
    return 1


def rows_needed(
    scheme: LayerScheme, suffix: str, shape: tuple[int, ...], start: int, stop: int, padded: bool = False
) -> tuple[int, int]:
    """The rows of a stored tensor of this ``shape`` that rows ``start`` to ``stop`` of the weight are decoded from.

    ``start`` must be a multiple of `row_tile`.
    """
    weights = scheme.weights
    first = shape[0] if shape else 1
    if suffix in ("weight", "weight_packed"):
        return start, stop
    if suffix == "weight_zero_point" and scheme.format == PACK and weights.strategy != "tensor":
        return words(start, weights.bits, padded), words(stop, weights.bits, padded)
    if suffix in ("weight_scale", "weight_zero_point") and weights.strategy != "tensor":
        if weights.strategy == "block":
            assert weights.block is not None
            return start // weights.block[0], -(-stop // weights.block[0])
        return start, stop
    return 0, first

"""The quantized weights of a compressed-tensors artifact, from its config block and the headers of its files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from loadstone.artifact.compressed_tensors.block import Block
from loadstone.artifact.compressed_tensors.layout import row_tile, rows_needed, scale_grid, words
from loadstone.artifact.compressed_tensors.scheme import MXFP4, MXFP8, NVFP4, PACK, LayerScheme
from loadstone.artifact.compressed_tensors.weight import QuantizedWeight
from loadstone.artifact.files import Sink, open_regular, refuse
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.errors import ArtifactError

# Suffixes of what stands for a module's weight. Those of `_UNUSED` are for kernels and caches: not part of a weight.
_WEIGHT = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight_g_idx",
)  # fmt: skip
_UNUSED = (
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale",
    "k_zero_point", "v_scale", "v_zero_point", "q_scale", "q_zero_point", "activation_scale", "input_scale_ub",
)  # fmt: skip


@dataclass(frozen=True)
class PackedWeight(QuantizedWeight):
    """A weight of this layout. ``parts``: by suffix (``weight_packed``, ``weight_scale``, …). ``padded``: see
    `Block.padded_packing`. ``columns``: what the value of ``weight_shape`` says, where headers do not tell (see
    `columns_known`).
    """

    name: str
    scheme: LayerScheme
    parts: dict[str, TensorInfo] = field(repr=False)
    padded: bool = False
    columns: int | None = None

    @property
    def values(self) -> TensorInfo:
        """The stored tensor that holds the integers or small floats."""
        return self.parts["weight_packed" if self.scheme.packed else "weight"]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns). Where nothing tells the columns, the most that may be packed."""
        rows, stored = self.values.shape
        if self.columns is not None:
            return rows, self.columns
        if not self.scheme.packed:
            return rows, stored
        if self.scheme.format != PACK:
            return rows, stored * 2
        weights = self.scheme.weights
        if self._columns_by_scale is not None:
            return rows, self._columns_by_scale
        return rows, stored * (32 // weights.bits) if self.padded else stored * 32 // weights.bits

    @property
    def columns_known(self) -> bool:
        """Whether headers alone tell the number of columns."""
        return self.scheme.format != PACK or self._columns_by_scale is not None

    @property
    def _columns_by_scale(self) -> int | None:
        """Columns of whole groups, where that many are packed."""
        weights, scale = self.scheme.weights, self.parts["weight_scale"].shape
        if not weights.grouped or "weight_g_idx" in self.parts or not scale:
            return None
        columns = scale[-1] * (weights.group_size or 1)
        return columns if words(columns, weights.bits, self.padded) == self.values.shape[-1] else None

    @property
    def dtype(self) -> str:
        """The floating dtype of its scales, in safetensors' spelling; BF16 for formats with scales of their own."""
        stored = self.parts["weight_scale"].dtype
        return stored if stored in FLOAT_DTYPES else "BF16"

    @property
    def row_tile(self) -> int:
        """Rows can be decoded apart from the others in multiples of this."""
        return row_tile(self.scheme)

    def rows_needed(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """The rows of a stored tensor that rows ``start`` to ``stop`` of the weight are decoded from."""
        return rows_needed(self.scheme, suffix, self.parts[suffix].shape, start, stop, self.padded)


def packed_weights(
    block: Block,
    tensors: dict[str, TensorInfo],
    sink: Sink = refuse,
    read_shape: Callable[[TensorInfo], tuple[int, int]] | None = None,
) -> dict[str, PackedWeight]:
    """Every quantized weight by the name of its parameter; raises `ArtifactError` for one that is incomplete.

    With another ``sink``, problems go there and the weight is left out. ``read_shape``: reads a stored
    ``weight_shape``; it is called where headers do not tell the number of columns.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in _WEIGHT or (suffix == "weight" and tensor.dtype in ("I8", "F8_E4M3", "F8_E5M2")):
            parts.setdefault(module, {})[suffix] = tensor
    found: dict[str, PackedWeight] = {}
    checked: set[tuple[object, ...]] = set()
    for module, own in parts.items():
        try:
            weight = _weight(block, module, own, tensors)
            if read_shape and not weight.columns_known and "weight_shape" in own:
                weight = replace(weight, columns=read_shape(own["weight_shape"])[1])
            key = (weight.scheme, weight.columns, *((suffix, p.dtype, p.shape) for suffix, p in own.items()))
            # Thousands of experts share a handful of shapes.
            if key not in checked:
                _check(weight)
                checked.add(key)
            found[weight.name] = weight
        except ArtifactError as error:
            sink(error)
    return found


def stored_shape(directory: Path, info: TensorInfo) -> tuple[int, int]:
    """The two numbers of a stored ``weight_shape``; raises `ArtifactError` for anything else."""
    if info.dtype in ("I64", "I32") and info.shape == (2,):
        with open_regular(directory / info.file) as file:
            file.seek(info.begin)
            raw = file.read(info.nbytes)
        if len(raw) == info.nbytes:
            rows, columns = struct.unpack("<2q" if info.dtype == "I64" else "<2i", raw)
            if 0 < rows < 1 << 40 and 0 < columns < 1 << 40:
                return rows, columns
    raise ArtifactError(f"{info.file}: '{info.name}' does not hold the two sides of a weight", _AGAIN)


def is_side_tensor(name: str) -> bool:
    """Whether a stored tensor serves kernels or the KV cache (``input_scale``, ``k_scale``): no parameter of the
    model."""
    return name.rpartition(".")[2] in _UNUSED


def _weight(
    block: Block, module: str, parts: dict[str, TensorInfo], tensors: dict[str, TensorInfo]
) -> PackedWeight:
    first = next(iter(parts.values()))
    scheme = block.scheme_of(module)
    if scheme is None:
        raise ArtifactError(
            f"{first.file}: '{first.name}' is quantized, and no group of config.json names its module", _AGAIN
        )
    weight = PackedWeight(f"{module}.weight" if module else "weight", scheme, parts, block.padded_packing)
    values = "weight_packed" if scheme.packed else "weight"
    for needed in (values, "weight_scale"):
        if needed not in parts:
            if needed == "weight" and f"{module}.weight" in tensors:
                raise ArtifactError(
                    f"{first.file}: '{module}.weight' has dtype {tensors[f'{module}.weight'].dtype} and a scale: "
                    f"it is not compressed (config.json says {scheme.format})",
                    "Save it again compressed (llm-compressor: save_compressed=True)",
                )
            raise ArtifactError(f"{first.file}: '{module}' lacks {needed} of {scheme.format}", _AGAIN)
    if scheme.packed and f"{module}.weight" in tensors:
        raise ArtifactError(f"{first.file}: '{module}' is stored both plain and quantized", _AGAIN)
    if not scheme.weights.symmetric and "weight_zero_point" not in parts:
        raise ArtifactError(f"{first.file}: '{module}' is asymmetric and lacks weight_zero_point", _AGAIN)
    if scheme.format == NVFP4 and "weight_global_scale" not in parts:
        raise ArtifactError(f"{first.file}: '{module}' lacks weight_global_scale of {scheme.format}", _AGAIN)
    return weight


def _check(weight: PackedWeight) -> None:
    """Raise `ArtifactError` where the stored tensors do not fit each other and the scheme."""
    scheme, weights, values = weight.scheme, weight.scheme.weights, weight.values
    if len(values.shape) != 2 or 0 in values.shape:
        raise _misfit(values, f"has shape {list(values.shape)}, a weight has two sides")
    dtypes = {PACK: ("I32",), NVFP4: ("U8",), MXFP4: ("U8",), MXFP8: ("F8_E4M3",)}.get(
        scheme.format, ("F8_E4M3", "F8_E5M2") if weights.type == "float" else ("I8",)
    )
    if values.dtype not in dtypes:
        raise _misfit(values, f"has dtype {values.dtype}, {scheme.format} holds {' or '.join(dtypes)}")
    if weights.bits > 8:
        raise _misfit(values, f"holds {weights.bits} bits a value, at most 8 are read here")
    scale = weight.parts["weight_scale"]
    kinds = {NVFP4: {"F8_E4M3"}, MXFP4: {"U8", "F8_E8M0"}, MXFP8: {"U8", "F8_E8M0"}}.get(
        scheme.format, FLOAT_DTYPES
    )
    if scale.dtype not in kinds:
        raise _misfit(scale, f"has dtype {scale.dtype}, {scheme.format} takes {' or '.join(sorted(kinds))}")
    # Not `weight.shape`: that follows from the scales where it can, and they are what is looked at.
    rows, columns = values.shape
    if scheme.packed and scheme.format != PACK:
        columns *= 2
    if scheme.format == PACK:
        columns = weight.shape[1]
        if words(columns, weights.bits, weight.padded) != values.shape[1]:
            raise _misfit(
                values,
                f"has {values.shape[1]} words a row, the scales of {columns} columns ask for "
                f"{words(columns, weights.bits, weight.padded)}",
            )
    grid = scale_grid(weights, rows, columns)
    if scale.shape != grid and not _same_scale(scale.shape, grid):
        raise _misfit(scale, f"has shape {list(scale.shape)}, {scheme} of {rows}x{columns} has {list(grid)}")
    zero = weight.parts.get("weight_zero_point")
    if zero is not None and not weights.symmetric:
        wanted = grid
        if scheme.format == PACK and weights.strategy != "tensor":
            wanted = (words(rows, weights.bits, weight.padded), grid[1])
        if zero.shape != wanted and not _same_scale(zero.shape, wanted):
            raise _misfit(zero, f"has shape {list(zero.shape)}, not {list(wanted)}")


def _same_scale(shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """One scale may be stored as a number or with sides of 1, and one a row without the second side."""
    if prod(grid) == 1:
        return prod(shape) == 1
    return len(grid) == 2 and grid[1] == 1 and shape == grid[:1]


def _misfit(part: TensorInfo, what: str) -> ArtifactError:
    return ArtifactError(f"{part.file}: '{part.name}' {what}", _AGAIN)


_AGAIN = "Copy the file again, or make the artifact again"

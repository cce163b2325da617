"""A weight that is stored as a group of tensors and decodes to one dense tensor, block of rows by block of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm, prod

from loadstone.artifact.compressed_tensors import LayerScheme, PackedWeight
from loadstone.artifact.compressed_tensors.weight import QuantizedWeight
from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.errors import ArtifactError

AGAIN = "Copy the file again, or make the artifact again"


@dataclass(frozen=True)
class StoredWeight(QuantizedWeight):
    """A weight that another quantizer than compressed-tensors stored. ``values_in``: the suffix of its values.

    ``heights``: by suffix, the rows of the weight, or the part of one, that belong to one stored row; 0 for tensors
    that are needed whole.
    """

    name: str
    scheme: LayerScheme
    parts: Mapping[str, TensorInfo] = field(repr=False)
    shape: tuple[int, ...]
    heights: Mapping[str, int | Fraction] = field(repr=False)
    values_in: str = "weight"

    @property
    def values(self) -> TensorInfo:
        """The stored tensor that holds the integers or small floats."""
        return self.parts[self.values_in]

    @property
    def dtype(self) -> str:
        """The floating dtype that it stands for where the config names none, in safetensors' spelling."""
        stored = self.parts["weight_scale"].dtype
        return stored if stored == "F16" else "BF16"

    @property
    def row_tile(self) -> int:
        """Rows can be decoded apart from the others in multiples of this."""
        tall = [height.numerator for height in self.heights.values() if height]
        return lcm(*tall) if tall else prod(self.shape[:-1])

    def rows_needed(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """The part of a stored tensor, along its first dimension, that rows ``start`` to ``stop`` are decoded from."""
        height, stored = self.heights[suffix], self.parts[suffix].shape
        return (start // height, -(-stop // height)) if height else (0, stored[0] if stored else 1)


# What loading, planning and reports take.
Packed = PackedWeight | StoredWeight


def misfit(part: TensorInfo, what: str) -> ArtifactError:
    """The error for a stored tensor that does not fit the others of its weight."""
    return ArtifactError(f"{part.file}: '{part.name}' {what}", AGAIN)

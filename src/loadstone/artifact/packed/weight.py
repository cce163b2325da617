"""A weight that is stored as a group of tensors and decodes to one dense tensor, block of rows by block of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

from loadstone.artifact.compressed_tensors.scheme import LayerScheme
from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.errors import ArtifactError

AGAIN = "Copy the file again, or make the artifact again"


class Packed(Protocol):
    """What loading, planning and reports ask of such a weight, whatever its format.

    A weight (…, in) counts as a matrix (rows, in), all leading dimensions flattened.
    """

    @property
    def name(self) -> str:
        """The parameter's name in the checkpoint (``P.weight``)."""
        ...

    @property
    def scheme(self) -> LayerScheme:
        """The number format and what shares a scale."""
        ...

    @property
    def parts(self) -> Mapping[str, TensorInfo]:
        """The stored tensors by suffix; ``weight_scale`` is the scales, whatever the file calls it."""
        ...

    @property
    def type(self) -> str:
        """The scheme's name."""
        ...

    @property
    def module(self) -> str: ...

    @property
    def values(self) -> TensorInfo:
        """The stored tensor that holds the integers or small floats."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense tensor."""
        ...

    @property
    def numel(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales and zero points included."""
        ...

    @property
    def dtype(self) -> str:
        """The floating dtype that it stands for where the config names none, in safetensors' spelling."""
        ...

    @property
    def nominal_bits(self) -> int:
        """Bits per weight of the number format alone."""
        ...

    @property
    def quantizes_activations(self) -> bool: ...

    @property
    def row_tile(self) -> int:
        """Rows can be decoded apart from the others in multiples of this."""
        ...

    def rows_needed(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """The part of a stored tensor, along its first dimension, that rows ``start`` to ``stop`` are decoded from."""
        ...


@dataclass(frozen=True)
class StoredWeight:
    """A `Packed` weight. ``values_in``: the suffix of its values.

    ``heights``: by suffix, the rows of the weight that belong to one stored row; 0 for tensors that are needed whole.
    """

    name: str
    scheme: LayerScheme
    parts: Mapping[str, TensorInfo] = field(repr=False)
    shape: tuple[int, ...]
    heights: Mapping[str, int] = field(repr=False)
    values_in: str = "weight"

    @property
    def type(self) -> str:
        return str(self.scheme)

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def values(self) -> TensorInfo:
        return self.parts[self.values_in]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def dtype(self) -> str:
        stored = self.parts["weight_scale"].dtype
        return stored if stored == "F16" else "BF16"

    @property
    def nominal_bits(self) -> int:
        return self.scheme.weights.bits

    @property
    def quantizes_activations(self) -> bool:
        return self.scheme.inputs is not None

    @property
    def row_tile(self) -> int:
        # Heights divide each other.
        return max(self.heights.values()) or prod(self.shape[:-1])

    def rows_needed(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        height, stored = self.heights[suffix], self.parts[suffix].shape
        return (start // height, -(-stop // height)) if height else (0, stored[0] if stored else 1)


def misfit(part: TensorInfo, what: str) -> ArtifactError:
    """The error for a stored tensor that does not fit the others of its weight."""
    return ArtifactError(f"{part.file}: '{part.name}' {what}", AGAIN)

"""What the scheme and the stored tensors of a quantized weight say, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from loadstone.artifact.compressed_tensors.scheme import LayerScheme
from loadstone.artifact.formats.safetensors import TensorInfo


class QuantizedWeight:
    """A weight that is stored as several tensors, and counts as a matrix (rows, in) whatever its shape (…, in).

    ``name``: of the parameter it stands for (``P.weight``). ``scheme``: number format and what shares a scale.
    ``parts``: the stored tensors by suffix; ``weight_scale`` is the scales, whatever the file calls it. ``shape``: of
    the dense tensor.
    """

    name: str
    scheme: LayerScheme
    parts: Mapping[str, TensorInfo]

    if TYPE_CHECKING:

        @property
        def shape(self) -> tuple[int, ...]: ...

    @property
    def type(self) -> str:
        """The scheme's name."""
        return str(self.scheme)

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales and zero points included."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def nominal_bits(self) -> int:
        """Bits per weight of the number format alone."""
        return self.scheme.weights.bits

    @property
    def quantizes_activations(self) -> bool:
        return self.scheme.inputs is not None

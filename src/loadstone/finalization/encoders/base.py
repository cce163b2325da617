"""The interface of an output format: what a weight is stored as, and how its rows are encoded.

An `Encoder` is one format; it gives an `Encoding` for each weight. Planning asks for names and sizes, streaming for the
encoded rows. To add a format, add a file beside `torchao.py` that has both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from loadstone.artifact import TensorInfo
from loadstone.artifact.servers import Runs
from loadstone.quantization.model_facts import ModelFacts
from loadstone.quantization.recipe_file import MixedRecipe
from loadstone.quantization.rules import Decision
from loadstone.quantization.schemes import Recipe, Scheme

if TYPE_CHECKING:
    import torch


class Encoding(Protocol):
    """How one weight is stored. A weight (…, in) counts as a matrix (rows, in), all leading dimensions flattened."""

    @property
    def scheme(self) -> Scheme:
        """What the values are rounded to."""
        ...

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """The stored tensors with their names, dtypes, shapes and bytes; no file and offset yet."""
        ...

    @property
    def dtype(self) -> str:
        """The floating dtype that rows are cast to before `encode`, in safetensors' spelling (``BF16``)."""
        ...

    @property
    def row_multiple(self) -> int:
        """`encode` takes blocks of any multiple of this number of rows; 0: only ``rows_together`` rows at once."""
        ...

    @property
    def rows_together(self) -> int:
        """Rows that are read together because they share a scale, often all; 0 where rows are independent."""
        ...

    @property
    def temporaries(self) -> int:
        """Memory that `encode` takes, as a multiple of what casting takes: blocks are smaller by this factor."""
        ...

    @property
    def moves(self) -> bool:
        """Whether `encode` takes the values of a quantized tensor as they are stored."""
        ...

    @property
    def shares_scale(self) -> bool:
        """Whether layers that servers merge take one scale of the whole tensor, from the largest value of all."""
        ...

    @property
    def scales_inputs(self) -> bool:
        """Whether the stored tensors hold a scale for the layer's inputs, where AWQ or SmoothQuant chose one."""
        ...

    def encode(
        self, rows: torch.Tensor, first_row: int, extremes: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Encode ``rows`` (n, in), the first of which is row ``first_row`` of the weight.

        ``extremes``: smallest and largest value of all ``rows_together`` rows, where ``row_multiple`` allows to encode
        them in blocks; else None. Yields (name of a stored tensor, part of it, byte offset of that part).
        """
        ...

    def with_scheme(self, scheme: Scheme) -> Encoding:
        """The same stored tensors with values rounded by ``scheme``, which differs in its rounding alone."""
        ...

    def store(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors, by name, of a whole weight that is quantized already (a torchao tensor)."""
        ...

    def dequantize(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight (out, in) that a Linear computes with when it is loaded from the ``stored`` tensors."""
        ...


class Encoder(Protocol):
    """One output format."""

    @property
    def kind(self) -> str:
        """Kind of the artifact, for its manifest."""
        ...

    @property
    def keeps_names(self) -> bool:
        """Whether weights are stored under their names and shapes in the source checkpoint, experts one by one; else
        as the model's parameters."""
        ...

    def rounding(self, recipe: Recipe) -> Recipe:
        """The recipe that has to run here to quantize by ``recipe``; raises `UsageError` where there is no such
        layout."""
        ...

    def decide(
        self, model: ModelFacts, recipe: Recipe | MixedRecipe, skip: list[str] | None
    ) -> dict[str, Decision]:
        """What happens to each matrix weight of ``model``, by parameter name."""
        ...

    def encoding(self, name: str, scheme: Scheme, shape: tuple[int, ...], dtype: str) -> Encoding:
        """How the weight ``name`` is stored; ``dtype``: its floating dtype, in safetensors' spelling."""
        ...

    def header(self, encodings: Mapping[str, Encoding | None]) -> dict[str, str]:
        """Metadata for the header of every shard. ``encodings``: of all parameters by name, None for plain ones."""
        ...

    def config(
        self,
        recipe: Recipe | MixedRecipe,
        skip: list[str] | None,
        decisions: Mapping[str, Decision],
        stored: Mapping[str, Encoding | TensorInfo],
    ) -> dict[str, Any]:
        """Entries to add to config.json, such as ``quantization_config``. ``stored``: everything in the output, plain
        tensors as such."""
        ...

    def runs(
        self, stored: Mapping[str, Encoding | TensorInfo], config: Mapping[str, Any]
    ) -> tuple[Runs, ...]:
        """Where the output runs; ``stored`` and ``config`` as `config` has them."""
        ...


def row_offset(output: TensorInfo, row: int, rows: int, multiple: int = 1) -> int:
    """Byte offset of ``row`` in a stored tensor of a weight of ``rows`` rows.

    Every row takes as many bytes; where the tensor is stored in tiles of ``multiple`` rows, the last is filled up.
    """
    stored = rows if output.shape[:1] == (rows,) else -(-rows // multiple) * multiple
    return output.nbytes * row // stored

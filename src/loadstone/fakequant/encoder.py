"""Fake-quantized weights as an output format of finalize: quantized, dequantized and stored under their own name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from loadstone.artifact import TensorInfo
from loadstone.errors import ArtifactError
from loadstone.fakequant.formats import Format
from loadstone.fakequant.formats.fold import fold_rows
from loadstone.fakequant.formats.spec import Own, misfit
from loadstone.finalization.encoders.base import row_offset
from loadstone.quantization.quantize import dense
from loadstone.quantization.schemes import Recipe


@dataclass(frozen=True)
class FakeQuantEncoding:
    """A weight (out, in), or (experts, out, in) with each expert on its own, rounded to ``format``.

    ``transposed``: it is stored as (…, in, out).
    """

    output: TensorInfo
    format: Format
    transposed: bool = False

    def __post_init__(self) -> None:
        *rest, rows, width = self.output.shape
        shape = (*rest, width, rows) if self.transposed else (*rest, rows, width)
        if problem := misfit(self.format.weight, shape):
            raise ArtifactError(
                f"tensor '{self.output.name}' cannot be folded: {problem}",
                "Leave it out by a rule (format: none)",
            )

    @property
    def scheme(self) -> Any:
        spec = self.format.weight
        return spec.scheme if isinstance(spec, Recipe) else spec

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return (self.output,)

    @property
    def dtype(self) -> str:
        return self.output.dtype

    @property
    def row_multiple(self) -> int:
        spec = self.format.weight
        # torchao's recipes and rows that lie across the stored ones are folded all at once.
        return 0 if self.transposed or isinstance(spec, Recipe | Own) else spec.row_multiple

    @property
    def rows_together(self) -> int:
        spec, multiple = self.format.weight, self.row_multiple
        # Squares of rows begin anew with each expert.
        independent = multiple == 1 or (multiple > 1 and len(self.output.shape) == 2)
        together = not independent or isinstance(spec, Recipe | Own) or spec.scaled_by_tensor
        return self.output.shape[-2] if together else 0

    @property
    def temporaries(self) -> int:
        return 4

    @property
    def moves(self) -> bool:
        return False

    @property
    def shares_scale(self) -> bool:
        return False

    @property
    def scales_inputs(self) -> bool:
        return False

    def encode(
        self, rows: torch.Tensor, first_row: int, extremes: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Iterator[tuple[str, torch.Tensor, int]]:
        amax = None
        if extremes:
            low, high = extremes
            amax = torch.maximum(low.abs(), high.abs()).float()
        if self.transposed:
            # Scales run along a weight's inputs.
            folded = fold_rows(rows.t().contiguous(), self.format.weight, amax).t()
        else:
            folded = fold_rows(rows, self.format.weight, amax)
        count = self.output.numel // self.output.shape[-1]
        yield self.output.name, folded, row_offset(self.output, first_row, count)

    def with_scheme(self, scheme: Any) -> FakeQuantEncoding:
        spec = self.format.weight
        weight = replace(spec, scheme=scheme) if isinstance(spec, Recipe) else scheme
        return replace(self, format=replace(self.format, weight=weight))

    def store(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.output.name: dense(tensor)}

    def dequantize(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return stored[self.output.name]

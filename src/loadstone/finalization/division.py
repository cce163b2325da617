"""Experts that are stored in one tensor, as the matrices of each expert that the serving layout stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from loadstone.artifact import Artifact, TensorInfo
from loadstone.loading.experts import learned_place, stored_layout
from loadstone.loading.meta import Destination, ModelMap
from loadstone.quantization.model_facts import ExpertLayout, expert_matrix

if TYPE_CHECKING:
    import torch


class ExpertRows(NamedTuple):
    """``height`` rows from ``first`` on of all experts' matrices (out, in) one above the other, which the
    tensor ``whole`` holds in its own ``layout``."""

    whole: TensorInfo
    first: int
    height: int
    layout: ExpertLayout


class Matrix(NamedTuple):
    """A matrix that a source tensor is stored as. ``first_row``: in the parameter. ``rows``: where it is, if it is no
    range of bytes."""

    info: TensorInfo
    first_row: int
    rows: ExpertRows | None = None


@dataclass(frozen=True)
class ExpertsApart:
    """A source (see `artifact.source`) of which some matrices of experts are read by name, as (out, in)."""

    stored: Any = field(repr=False)
    experts: Mapping[str, ExpertRows] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)

    def tile(self, info: TensorInfo) -> int:
        return info.numel if info.name in self.experts else int(self.stored.tile(info))

    def read(
        self, info: TensorInfo, start: int = 0, stop: int | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        rows = self.experts.get(info.name)
        if rows is None:
            found: torch.Tensor = self.stored.read(info, start, stop, pinned=pinned)
            return found
        whole, size = rows.whole, prod(rows.whole.shape[1:])
        each = whole.shape[2 if rows.layout.transposed else 1]
        expert, first = divmod(rows.first, each)
        stored = self.stored.read(whole, expert * size, (expert + 1) * size).view(whole.shape[1:])
        values = expert_matrix(stored, first, rows.height, rows.layout).reshape(-1)
        return values.view(info.shape) if stop is None else values[start:stop]


def separated(info: TensorInfo, artifact: Artifact, place: Destination, mapped: ModelMap) -> list[Matrix]:
    """The matrices that a source tensor is stored as; empty where it cannot be divided."""
    if len(info.shape) == 2:
        return [Matrix(info, _first_row(info, place, mapped))]
    weight = next(weight for weight in mapped.facts.weights if weight.name == place.parameter)
    layout = stored_layout(weight.experts, place.operations, info.shape, weight.shape)
    if len(info.shape) != 3 or layout is None:
        return []
    last = place.parameter.rpartition(".")[2]
    # Names of single experts follow from that of the module, which a load renames the stored tensor to (Granite's).
    name = info.name if info.name.removesuffix(".weight").endswith(f".{last}") else place.parameter
    ranges = artifact.weights.format == "safetensors" and artifact.adapter is None
    if ranges and layout == ExpertLayout():
        parts = divided(info._replace(name=name), mapped.saved_rows(place.parameter, info.shape))
        return [Matrix(part, _rows_before(part, info)) for part in parts]
    experts, height, width = info.shape
    shape = (experts, width, height) if layout.transposed else info.shape
    upright = info._replace(name=f"{name.rpartition('.')[0]}.{last}", shape=shape)
    saved = mapped.saved_rows(place.parameter, shape) if layout == ExpertLayout() else {}
    found = []
    for part in divided(upright, saved):
        first = _rows_before(part, upright)
        found.append(Matrix(part, first, ExpertRows(info, first, part.shape[0], layout)))
    return found


def _rows_before(part: TensorInfo, info: TensorInfo) -> int:
    """Rows of all experts' matrices before those of a part."""
    return (part.begin - info.begin) * prod(info.shape[:-1]) // info.nbytes


def _first_row(info: TensorInfo, place: Destination, mapped: ModelMap) -> int:
    """The first row of one expert's matrix among those of all experts."""
    found = place.place or learned_place(info.name, place.pattern)
    if found is None:
        return 0
    weight = next(weight for weight in mapped.facts.weights if weight.name == place.parameter)
    transposed = weight.experts is not None and weight.experts.transposed
    return found[0] * weight.shape[2 if transposed else 1] + found[1] * info.shape[0]


def divided(info: TensorInfo, saved: Mapping[str, int]) -> list[TensorInfo]:
    """The matrices of each expert in a tensor of all experts (experts, out, in), as byte ranges of the same file.

    ``saved``: names that transformers gives them, with their first rows, in order. Without such names, those of
    transformers' own experts, whose gate is above up.
    """
    experts, rows, columns = info.shape
    names = dict(saved)
    if not names:
        owner, _, last = info.name.removesuffix(".weight").rpartition(".")
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        height = rows // len(parts)
        numbered = [(expert, number) for expert in range(experts) for number in range(len(parts))]
        names = {
            f"{owner}.{expert}.{parts[number]}.weight": expert * rows + number * height
            for expert, number in numbered
        }
    size = info.nbytes // (experts * rows)
    ends = [*list(names.values())[1:], experts * rows]
    return [
        info._replace(
            name=name,
            shape=(end - start, columns),
            begin=info.begin + start * size,
            end=info.begin + end * size,
        )
        for (name, start), end in zip(names.items(), ends, strict=True)
    ]

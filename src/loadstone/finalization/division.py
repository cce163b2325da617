"""Experts that are stored in one tensor, as the matrices of each expert that the serving layout stores."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from loadstone.artifact import Artifact, TensorInfo
from loadstone.loading.meta import Destination, ModelMap


def separated(
    info: TensorInfo, artifact: Artifact, place: Destination, mapped: ModelMap
) -> list[tuple[TensorInfo, int]]:
    """The matrices that a source tensor is stored as, each with its first row in the parameter; empty where it cannot
    be divided."""
    if len(info.shape) == 2:
        return [(info, _first_row(info, place, mapped))]
    ranges = artifact.weights.format == "safetensors" and artifact.adapter is None
    if len(info.shape) != 3 or not ranges:
        return []
    parts = divided(info, mapped.saved_rows(place.parameter, info.shape))
    return [(part, (part.begin - info.begin) * prod(info.shape[:-1]) // info.nbytes) for part in parts]


def _first_row(info: TensorInfo, place: Destination, mapped: ModelMap) -> int:
    """The first row of one expert's matrix among those of all experts."""
    if place.place is None:
        return 0
    expert, number = place.place
    return expert * mapped.facts.shapes[place.parameter][-2] + number * info.shape[0]


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

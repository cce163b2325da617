"""Whether a checkpoint holds what its model needs: asked before work by finalize and export, and after a load."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from loadstone.artifact import TensorInfo
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MISSING = "is missing: it would be initialised at random"
UNEXPECTED = "is not part of this model"
CHECK_CONFIG = "Check that config.json is of these weights"
COPY_AGAIN = "Finalize or copy the model again"


class Destination(NamedTuple):
    """Where a checkpoint tensor goes: ``parameter`` in the model; ``converted`` when it is merged or reshaped there.

    ``place`` sorts the tensors of a parameter that is their rows in a row (fused experts: expert by expert, within one
    gate before up); None for other conversions.
    """

    parameter: str
    converted: bool
    place: tuple[int, int] | None = None


def ignored_keys(model: PreTrainedModel, unexpected: Iterable[str]) -> frozenset[str]:
    """Those of the ``unexpected`` checkpoint keys that transformers ignores for this model (such as ``inv_freq``)."""
    asked = frozenset(unexpected)
    return asked - _left(model, set(), set(asked)).unexpected_keys


def _left(model: PreTrainedModel, missing: set[str], unexpected: set[str]) -> SimpleNamespace:
    """What transformers' own rules leave of keys that are missing or unexpected."""
    info = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(info)
    return info


def check_stored(
    model: PreTrainedModel,
    stored: Mapping[str, TensorInfo],
    places: Mapping[str, Destination | None],
    where: str,
) -> None:
    """Hold the ``stored`` tensors against a model on the meta device, as a load of them would.

    ``places``: the parameter or buffer that each is loaded into; ``where``: the index or weight file, for messages.
    Raises `ArtifactError` naming the first tensor that is missing, is not part of the model or has another shape.
    """
    expected = model.state_dict()
    unknown = [key for key, place in places.items() if place is None]
    for key in sorted(set(unknown) - ignored_keys(model, unknown)):
        raise ArtifactError(
            f"{stored[key].file}: tensor '{key}' {UNEXPECTED} ({type(model).__name__})", CHECK_CONFIG
        )
    merged: dict[str, int] = {}
    for key, place in places.items():
        if place is None:
            continue
        info, shape = stored[key], tuple(expected[place.parameter].shape)
        if place.converted:
            merged[place.parameter] = merged.get(place.parameter, 0) + info.numel
        elif info.shape != shape:
            raise ArtifactError(
                f"{info.file}: tensor '{key}' has shape {list(info.shape)}, config.json asks for {list(shape)}",
                CHECK_CONFIG,
            )
    for name, count in merged.items():
        rows = next((p for p in places.values() if p and p.parameter == name and p.place is not None), None)
        if rows is not None and count != prod(expected[name].shape):
            key = next(k for k, p in places.items() if p and p.parameter == name)
            raise ArtifactError(
                f"{stored[key].file}: '{key}' and the tensors that it is merged with have {count:,} values, and "
                f"config.json asks for {prod(expected[name].shape):,} ('{name}')",
                CHECK_CONFIG,
            )
    for name in sorted(_missing(model, expected, places)):
        raise ArtifactError(
            f"{where}: tensor '{name}' {MISSING}", "Copy the checkpoint again, or check config.json"
        )


def _missing(
    model: PreTrainedModel, expected: Mapping[str, Any], places: Mapping[str, Destination | None]
) -> set[str]:
    """Parameters and buffers that no stored tensor gives; of tied ones, where none of them is stored."""
    given = {place.parameter for place in places.values() if place is not None}
    missing = set(expected) - given
    if not missing:
        return missing
    for target, source in model.all_tied_weights_keys.items():
        if source in given or target in given:
            missing -= {target, source}
    if any(place and place.converted for place in places.values()):
        # One stored tensor may become several parameters, of which its destination names the first.
        missing = {name for name in missing if not _split_from_one(model, name)}
    return _left(model, missing, set()).missing_keys if missing else missing


def _split_from_one(model: PreTrainedModel, name: str) -> bool:
    from transformers.conversion_mapping import get_model_conversion_mapping

    for entry in get_model_conversion_mapping(model, None, None):
        targets = entry.target_patterns
        if len(targets) > 1 and any(re.search(_any_part(target), name) for target in targets):
            return True
    return False


def _any_part(target: str) -> str:
    """A target pattern as a regular expression: stars, and the parts that its sources capture, stand for any text."""
    return re.sub(r"\\\d|\*", ".*", target)

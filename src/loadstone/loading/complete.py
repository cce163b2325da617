"""Whether a checkpoint holds what its model needs: asked before work by finalize and export, and after a load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from loadstone.artifact import TensorInfo
from loadstone.errors import ArtifactError
from loadstone.loading.experts import conversions_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MISSING = "is missing: it would be initialised at random"
UNEXPECTED = "is not part of this model"
CHECK_CONFIG = "Check that config.json is of these weights"
COPY_AGAIN = "Finalize or copy the model again"


class Destination(NamedTuple):
    """Where a checkpoint tensor goes: ``parameter`` in the model; ``pattern`` of transformers' conversion that merges
    or reshapes it there, None when it is taken as it is.

    ``place`` sorts the tensors of a parameter that is their rows in a row (fused experts: expert by expert, within one
    gate before up); None for other conversions. ``operations``: transformers' steps of the conversion.
    """

    parameter: str
    pattern: str | None = None
    place: tuple[int, int] | None = None
    operations: tuple[Any, ...] = ()

    @property
    def converted(self) -> bool:
        return self.pattern is not None


def ignored_keys(
    model: PreTrainedModel, stored: Mapping[str, TensorInfo], unexpected: Iterable[str]
) -> frozenset[str]:
    """Those of the ``unexpected`` checkpoint keys that transformers ignores for this model (such as ``inv_freq``), and
    `old_masks`."""
    asked = frozenset(unexpected)
    return (asked - _left(model, set(), set(asked)).unexpected_keys) | old_masks(stored, asked)


def old_masks(stored: Mapping[str, TensorInfo], names: Iterable[str]) -> frozenset[str]:
    """Those of the ``names`` that are causal masks, which transformers once saved with GPT-Neo, GPT-J and their like.

    ``bias`` of (1, 1, T, T) for T tokens, and the number ``masked_bias``: no layer has such parameters.
    """
    found = {name: stored[name] for name in names if name in stored}
    return frozenset(
        name
        for name, info in found.items()
        if (name.endswith(".masked_bias") and info.numel == 1)
        or (name.endswith(".bias") and info.shape[:2] == (1, 1) and info.shape[2:3] == info.shape[3:])
    )


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
    for key in sorted(set(unknown) - ignored_keys(model, stored, unknown)):
        # TRL saves its value head beside the language model, which does not use it.
        remedy = "Remove TRL's value head from the file" if key.startswith("v_head.") else CHECK_CONFIG
        raise ArtifactError(
            f"{stored[key].file}: tensor '{key}' {UNEXPECTED} ({type(model).__name__})", remedy
        )
    for key, place in places.items():
        if place is None or place.converted:
            continue
        info, shape = stored[key], tuple(expected[place.parameter].shape)
        if info.shape != shape:
            tokens = getattr(model.config.get_text_config(), "vocab_size", None)
            rows = info.shape[0] if info.shape[1:] == shape[1:] and shape[:1] == (tokens,) else 0
            raise ArtifactError(
                f"{info.file}: tensor '{key}' has shape {list(info.shape)}, config.json asks for {list(shape)}",
                f"{CHECK_CONFIG}; with added tokens, set vocab_size to {rows}" if rows else CHECK_CONFIG,
            )
    given = {place.parameter for place in places.values() if place is not None and not place.converted}
    given |= _converted(model, expected, stored, places)
    for name in sorted(_missing(model, expected, given)):
        raise ArtifactError(
            f"{where}: tensor '{name}' {MISSING}", "Copy the checkpoint again, or check config.json"
        )


def _converted(
    model: PreTrainedModel,
    expected: Mapping[str, torch.Tensor],
    stored: Mapping[str, TensorInfo],
    places: Mapping[str, Destination | None],
) -> set[str]:
    """The parameters that transformers' conversions make of stored tensors, found by converting on the meta device.

    Raises `ArtifactError` where a conversion fails or gives another shape.
    """
    merged: dict[str, list[str]] = {}
    for key, place in places.items():
        if place is not None and place.converted:
            merged.setdefault(place.parameter, []).append(key)
    if not merged:
        return set()
    import torch

    converters = converters_of(model)
    given: set[str] = set()
    for name, keys in merged.items():
        first = stored[keys[0]]
        parts = {
            key: torch.empty(stored[key].shape, dtype=expected[name].dtype, device="meta") for key in keys
        }
        try:
            results = convert(model, converters, name, parts, places)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{first.file}: '{keys[0]}' and the tensors that it is merged with do not make '{name}' ({reason})",
                CHECK_CONFIG,
            ) from None
        for target, result in results.items():
            shape = tuple(result.shape)
            if target in expected and shape != tuple(expected[target].shape):
                raise ArtifactError(
                    f"{first.file}: '{keys[0]}' and the tensors that it is merged with make '{target}' of shape "
                    f"{list(shape)}, config.json asks for {list(expected[target].shape)}",
                    CHECK_CONFIG,
                )
        given |= results.keys()
    return given


def converters_of(model: PreTrainedModel) -> dict[str, Any]:
    """transformers' converters for a model, by each pattern of keys that they merge."""
    from transformers.core_model_loading import WeightConverter

    return {
        p: each
        for each in conversions_of(model)
        if isinstance(each, WeightConverter)
        for p in each.source_patterns
    }


def convert(
    model: PreTrainedModel,
    converters: Mapping[str, Any],
    name: str,
    parts: Mapping[str, torch.Tensor],
    places: Mapping[str, Destination | None],
) -> dict[str, torch.Tensor]:
    """The parameters that transformers makes of checkpoint tensors (``parts``, by key) that are merged into ``name``.

    Raises what transformers raises where they do not fit.
    """
    from transformers.core_model_loading import dot_natural_key

    keys = sorted(parts, key=dot_natural_key)
    converter = deepcopy(converters[_pattern(places[keys[0]])])
    for key in keys:
        converter.add_tensor(name, key, _pattern(places[key]), parts[key])
    results = converter.convert(name, model=model, config=model.config)
    return {target: found[0] if isinstance(found, list) else found for target, found in results.items()}


def _pattern(place: Destination | None) -> str:
    assert place is not None and place.pattern is not None
    return place.pattern


def _missing(model: PreTrainedModel, expected: Iterable[str], given: set[str]) -> set[str]:
    """Parameters and buffers that are not ``given`` by a stored tensor; of tied ones, where none of them is stored."""
    missing = set(expected) - given
    if not missing:
        return missing
    for target, source in model.all_tied_weights_keys.items():
        if source in given or target in given:
            missing -= {target, source}
    if missing:
        # A module under two names, as code that came with a model may have, is stored under one of them.
        held = {_owner(model, name) for name in given}
        missing = {name for name in missing if _owner(model, name) not in held}
    return _left(model, missing, set()).missing_keys if missing else missing


def _owner(model: PreTrainedModel, name: str) -> tuple[int, str]:
    """The module object that holds a parameter or buffer, by its identity, and the name there."""
    module, _, own = name.rpartition(".")
    return id(model.get_submodule(module)), own

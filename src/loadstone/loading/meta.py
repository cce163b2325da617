"""The model without weights: which checkpoint key is which parameter, and which parameters are Linear weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, TensorInfo
from loadstone.loading.complete import Destination as Destination
from loadstone.loading.complete import check_stored
from loadstone.loading.experts import conversions_of, learn_experts
from loadstone.loading.model_class import (
    construction,
    generation_config,
    load_config,
    model_class_of,
    remote_code_failed,
)
from loadstone.quantization.model_facts import ModelFacts, facts_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def meta_model(artifact: Artifact, trust_remote_code: bool = False) -> PreTrainedModel:
    """The artifact's model with every parameter on the meta device; no memory, no weights read."""
    import torch
    from transformers.initialization import no_init_weights

    config = load_config(artifact, trust_remote_code)
    model_class = model_class_of(config, artifact, trust_remote_code)
    with construction(artifact, model_class), torch.device("meta"), no_init_weights():
        model: PreTrainedModel = model_class(config)
    if not hasattr(model, "all_tied_weights_keys"):
        raise remote_code_failed(artifact, AttributeError("its model does not call self.post_init()"))
    learn_experts(model, (*artifact.packed, *artifact.tensors))
    return model


# The names that a save gives to the rows of a merged parameter of some shape, each with its first row.
SavedRows = Callable[[str, tuple[int, ...]], dict[str, int]]


def saved_rows(model: PreTrainedModel, parameter: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The matrices that transformers stores a merged ``parameter`` (experts, rows, in) as: name -> first row, of all
    experts' rows. Empty where it is stored otherwise.

    Found by saving the numbers of its rows.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    count = prod(shape[:-1])
    numbers = torch.arange(count, dtype=torch.float64).view(*shape[:-1], 1)
    try:
        saved = revert_weight_conversion(model, {parameter: numbers})
    except (RuntimeError, ValueError, KeyError, IndexError):
        return {}
    first = {name: int(rows.flatten()[0]) for name, rows in saved.items() if rows.numel()}
    for name, rows in saved.items():
        start = first.get(name, 0)
        wanted = torch.arange(start, start + len(rows), dtype=torch.float64)[:, None]
        if rows.dim() != 2 or not torch.equal(rows, wanted):
            return {}
    return dict(sorted(first.items(), key=lambda entry: entry[1])) if len(first) > 1 else {}


def skeleton(model_class: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers, which no checkpoint holds, real."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    return model


@dataclass(frozen=True)
class ModelMap:
    """What planning asks of a model: its facts, where each tensor of the checkpoint goes (None: nowhere), the names in
    the model that a load gives to stored names, those that a save gives to parts of merged parameters. ``prefix``: of
    the base model's names, which a load adds or removes."""

    facts: ModelFacts
    places: dict[str, Destination | None]
    loaded_names: Callable[[list[str]], dict[str, str]] = field(repr=False)
    saved_rows: SavedRows = field(repr=False)
    prefix: str = ""


def model_map(
    artifact: Artifact, stored: Mapping[str, TensorInfo], trust_remote_code: bool = False
) -> ModelMap:
    """The map of an artifact whose files hold the ``stored`` tensors.

    Raises `ArtifactError` for tensors that are missing, are not part of the model or have another shape.
    """
    model = meta_model(artifact, trust_remote_code)
    places = destinations(model, list(stored))
    check_stored(model, stored, places, artifact.weights.index or artifact.weights.files[0])
    generation_config(artifact, model)
    named = partial(names_when_quantized, model)
    return ModelMap(facts_of(model), places, named, partial(saved_rows, model), model.base_model_prefix)


def destinations(model: PreTrainedModel, keys: list[str]) -> dict[str, Destination | None]:
    """For each checkpoint key the parameter it loads into, by transformers' own renaming; None when it has none."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = conversions_of(model, keys)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    places = _row_places(converters)
    operations = {p: tuple(entry.operations) for entry in converters for p in entry.source_patterns}
    result: dict[str, Destination | None] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        place = places[pattern] if pattern is not None and name in state else None
        if place is not None:
            numbers = [part for part in key.split(".") if part.isdigit()]
            place = (int(numbers[-1]), place[1]) if numbers else None
        made = operations.get(pattern, ()) if pattern is not None else ()
        result[key] = Destination(name, pattern, place, made) if name in state else None
    return result


def names_when_quantized(model: PreTrainedModel, stored: list[str]) -> dict[str, str]:
    """The name in the model that a load makes of each ``stored`` name, whether the model has such a tensor or not.

    The parts of a quantized weight (``x._weight_qdata``) are renamed before they are put together.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = conversions_of(model, stored)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
        for name in stored
    }


def _row_places(converters: list[Any]) -> dict[str, tuple[int, int] | None]:
    """For each source pattern of a conversion its position among those that one expert's rows are made of."""
    places: dict[str, tuple[int, int] | None] = {}
    for converter in converters:
        made = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
        stacked = made == [("MergeModulelist", 0)] and len(converter.source_patterns) == 1
        stacked |= made == [("MergeModulelist", 0), ("Concatenate", 1)]
        for number, pattern in enumerate(converter.source_patterns):
            places[pattern] = (0, number) if stacked and len(converter.target_patterns) == 1 else None
    return places

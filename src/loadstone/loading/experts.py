"""Experts that are stored one by one, for models that transformers loads from one tensor of all experts only.

The serving layout has a matrix for each expert. transformers merges these for most models (`WeightConverter`); for
those whose own checkpoints hold merged experts (Llama 4, gpt-oss, Qwen3-VL-MoE) such converters are made here, in the
layout of the model's own module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from loadstone.loading.model_class import BUILDING
from loadstone.quantization.model_facts import ExpertLayout, expert_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALONE = re.compile(r"(.+\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")
# Source patterns of the converters that are registered here.
_OURS = ("experts.*.gate_proj.weight", "experts.*.up_proj.weight", "experts.*.down_proj.weight")


def experts_alone(names: Iterable[str]) -> list[str]:
    """One name for each kind of matrix of experts that ``names`` holds one by one."""
    found: dict[str, str] = {}
    for name in names:
        if ".experts." in name and (match := _ALONE.fullmatch(name)):
            found.setdefault(match[2], name)
    return list(found.values())


def conversions_of(model: PreTrainedModel, names: Iterable[str] = ()) -> list[Any]:
    """transformers' conversions of a model's checkpoint tensors; with those that merge the experts among ``names``, and
    those that `learn_experts` added, where transformers has none."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    learned = [each for each in getattr(model, "_weight_conversions", None) or () if _is_ours(each)]
    # A load fills converters with tensors.
    mapping = [*get_model_conversion_mapping(model, None, None), *deepcopy(learned)]
    return [*mapping, *_missing(model, mapping, names)]


def learn_experts(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Let a model of this package's own remember how the experts among ``names`` are merged into its experts."""
    found = conversions_of(model, names)
    if any(map(_is_ours, found)):
        model._weight_conversions = found


def _missing(model: PreTrainedModel, mapping: list[Any], names: Iterable[str]) -> list[Any]:
    from transformers.core_model_loading import WeightConverter, rename_source_key

    alone = experts_alone(names)
    if not alone:
        return []
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    if rename_source_key(alone[0], [], converters, model.base_model_prefix, state)[1] is not None:
        return []
    layouts = {
        name: layout
        for module in model.modules()
        for name in ("gate_up_proj", "down_proj")
        if getattr(getattr(module, name, None), "ndim", 0) == 3
        and (layout := expert_layout(module, name)) is not None
    }
    return _converters(layouts) if layouts.keys() == {"gate_up_proj", "down_proj"} else []


@contextmanager
def registered_experts(model: PreTrainedModel) -> Iterator[None]:
    """Give what ``model`` has learned to loads of its class by transformers, for the length of the block only: it would
    hold for what the process saves of other models of the class, too."""
    from transformers import conversion_mapping

    ours = [each for each in conversions_of(model) if _is_ours(each)]
    if not ours:
        yield
        return
    kind = type(model).__name__
    if (known := conversion_mapping.get_checkpoint_conversion_mapping(kind)) is None:
        kind = model.config.model_type
        known = conversion_mapping.get_checkpoint_conversion_mapping(kind)
    users = kind in conversion_mapping.USER_REGISTERED_MAPPINGS
    with BUILDING:
        conversion_mapping.register_checkpoint_conversion_mapping(
            kind, [*(known or ()), *ours], overwrite=True
        )
        try:
            yield
        finally:
            # transformers has no call that takes a mapping back.
            if known is None:
                del conversion_mapping._checkpoint_conversion_mapping_cache[kind]
            else:
                conversion_mapping._checkpoint_conversion_mapping_cache[kind] = known
            if not users:
                conversion_mapping.USER_REGISTERED_MAPPINGS.discard(kind)


def stored_layout(
    layout: ExpertLayout | None, operations: tuple[Any, ...], stored: tuple[int, ...], shape: tuple[int, ...]
) -> ExpertLayout | None:
    """The layout of a stored tensor that transformers' ``operations`` turn into the model's ``layout`` (``shape``).

    None where they do more than turn matrices round or put rows in another order.
    """
    for operation in operations:
        kind = type(operation).__name__
        if layout is None or len(stored) != 3:
            return None
        if kind == "Transpose" and {operation.dim0, operation.dim1} == {1, 2}:
            if not operation.check_dims or stored != shape:
                layout = layout._replace(transposed=not layout.transposed)
        elif kind == "Interleave" and operation.dim == 1 and not operation.inverse and not layout.interleaved:
            layout = layout._replace(interleaved=True)
        else:
            return None
    return layout


def learned_place(name: str, pattern: str | None) -> tuple[int, int] | None:
    """The expert of a tensor that a converter made here merges, and 1 for up, else 0; None for other tensors."""
    if pattern not in _OURS:
        return None
    return int(name.split(".")[-3]), int(pattern == _OURS[1])


def forget_experts(model: PreTrainedModel) -> None:
    """Let a save of ``model`` write merged experts, which any transformers loads."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [c for c in conversions if not _is_ours(c)]


def _converters(layouts: dict[str, ExpertLayout]) -> list[Any]:
    from transformers.core_model_loading import (
        Concatenate,
        Interleave,
        MergeModulelist,
        Transpose,
        WeightConverter,
    )

    both, last = layouts["gate_up_proj"], layouts["down_proj"]
    made: list[Any] = [MergeModulelist(dim=0), Concatenate(dim=1)]
    made += [Interleave(dim=1, inverse=True)] if both.interleaved else []
    made += [Transpose(1, 2)] if both.transposed else []
    ending: list[Any] = [MergeModulelist(dim=0), *([Transpose(1, 2)] if last.transposed else [])]
    gate, up, down = _OURS
    return [
        WeightConverter([gate, up], "experts.gate_up_proj", operations=made),
        WeightConverter(down, "experts.down_proj", operations=ending),
    ]


def _is_ours(conversion: Any) -> bool:
    return any(pattern in _OURS for pattern in conversion.source_patterns)

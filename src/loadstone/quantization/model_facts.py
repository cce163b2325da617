"""Facts of a model that decide which of its parameters are quantized, as plain data without torch."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from loadstone.quantization.weight_use import (
    input_embeddings,
    output_head,
    parts_outside,
    weights_used_otherwise,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LINEAR, FUSED, EMBEDDING, MATRIX = "linear", "fused", "embedding", "matrix"


class ExpertLayout(NamedTuple):
    """How a 3-D weight holds the matrices of experts.

    ``transposed``: as (in, out); ``interleaved``: rows of gate and up in turn, not one half after the other.
    """

    transposed: bool = False
    interleaved: bool = False


class Weight(NamedTuple):
    """One matrix parameter. ``kind``: the weight of a Linear, a 3-D weight (fused experts), a table, another matrix or
    a convolution's weight.

    ``owner`` is its module's class. ``head``, ``table``: of the output head, of the input embeddings. ``excluded``:
    never quantized by transformers' default; ``float32_only``: nor where the output head is wanted. ``transposed``:
    whether fused experts are stored (in, out), None for other weights. ``used_otherwise``: how the model uses the
    weight of a Linear without calling it, which a quantized tensor does not allow; empty for others. ``outside``: which
    part of the model that is left out by default it lies in (a task head, a vision tower); empty for others.
    ``experts``: how a 3-D weight holds the matrices of experts; None where its module does not tell.
    """

    name: str
    module: str
    owner: str
    kind: str
    shape: tuple[int, ...]
    head: bool
    table: bool
    excluded: bool
    float32_only: bool
    transposed: bool | None
    used_otherwise: str = ""
    outside: str = ""
    experts: ExpertLayout | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model's matrix weights, and other facts that planning needs.

    ``tied``: transformers' `all_tied_weights_keys` (target to source). ``head`` is the output head's module name,
    ``table`` the class of the input embeddings, ``table_has_buffers`` whether they keep a scale beside the weight.
    """

    model: str
    weights: tuple[Weight, ...]
    tied: dict[str, str]
    head: str | None
    table: str | None
    table_has_buffers: bool

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of the weights by name."""
        return {weight.name: weight.shape for weight in self.weights}


def facts_of(model: PreTrainedModel) -> ModelFacts:
    """The facts of a live model, or of one on the meta device."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    head, table = output_head(model), input_embeddings(model)
    otherwise, outside = weights_used_otherwise(model), parts_outside(model)
    float32 = list(model._keep_in_fp32_modules or ())
    default = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    weights = []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = _kind(module, name, parameter)
            if not kind:
                continue
            full = f"{module_name}.{name}" if module_name else name
            weights.append(
                Weight(
                    full, module_name, type(module).__name__, kind, tuple(parameter.shape), module is head,
                    module is table, not should_convert_module(full, default),
                    not should_convert_module(full, float32), getattr(module, "is_transposed", None),
                    otherwise.get(module_name, "") if kind == LINEAR else "",
                    next((why for part, why in outside.items() if f"{module_name}.".startswith(f"{part}.")), ""),
                    expert_layout(module, name) if kind == FUSED else None,
                )
            )  # fmt: skip
    return ModelFacts(
        type(model).__name__,
        tuple(weights),
        dict(model.all_tied_weights_keys),
        next((name for name, module in model.named_modules() if module is head), "")
        if head is not None
        else None,
        type(table).__name__ if table is not None else None,
        table is not None and any(True for _ in table.buffers()),
    )


def expert_layout(module: torch.nn.Module, name: str) -> ExpertLayout | None:
    """How the 3-D parameter ``name`` of a module of experts holds their matrices; None where nothing tells.

    transformers' own kind says it. Others compute with their tensors themselves: the shapes of both products together
    allow one orientation only, and slices with a step of two mean that gate and up take turns.
    """
    gated = name == "gate_up_proj"
    if hasattr(module, "is_transposed"):
        return ExpertLayout(
            bool(module.is_transposed), gated and not getattr(module, "is_concatenated", True)
        )
    first, last = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if name not in ("gate_up_proj", "down_proj") or first is None or last is None or last.dim() != 3:
        return None
    (_, a, b), (_, c, d) = first.shape, last.shape
    if not (a == d and b == 2 * c) and not (b == c and a == 2 * d):
        return None
    owner: Any = type(module)
    source = _source_of(owner)
    return ExpertLayout(a == d, gated and "::2" in source) if source else None


@cache
def _source_of(module_class: type) -> str:
    """The Python code of a class; empty where there is none. Finding it takes tens of milliseconds."""
    try:
        return inspect.getsource(module_class)
    except (OSError, TypeError):
        return ""


def expert_matrix(stored: torch.Tensor, first: int, height: int, layout: ExpertLayout) -> torch.Tensor:
    """``height`` rows from ``first`` on, a view (height, in), of what one expert's part of a tensor in some ``layout``
    is as (out, in) with gate above up."""
    upright = stored.t() if layout.transposed else stored
    if layout.interleaved:
        return upright[first // height :: len(upright) // height]
    return upright[first : first + height]


def _kind(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> str:
    import torch

    if isinstance(module, torch.nn.Linear) and name == "weight":
        return LINEAR
    if isinstance(module, torch.nn.modules.conv._ConvNd) and name == "weight":
        return MATRIX
    if parameter.dim() == 3:
        return FUSED
    if isinstance(module, torch.nn.Embedding):
        return EMBEDDING
    return MATRIX if parameter.dim() == 2 else ""

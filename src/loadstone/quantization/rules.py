"""Which parameters are quantized: transformers' own rule for torchao, so that a stock reload agrees."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from loadstone.errors import UsageError
from loadstone.quantization.schemes import (
    Int4WeightOnly,
    Int8DynActIntxWeight,
    IntxWeightOnly,
    MxDynActMxWeight,
    Nvfp4DynActNvfp4Weight,
    Nvfp4WeightOnly,
    Scheme,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Decision:
    """What happens to one parameter: a scheme, or None and the reason it stays as it is."""

    scheme: Scheme | None
    reason: str
    linear: bool = False
    misfit: bool = False


def decide(model: PreTrainedModel, scheme: Scheme, skip: list[str] | None = None) -> dict[str, Decision]:
    """A decision for each matrix weight of ``model`` (on the meta device).

    Quantized are the weights of `nn.Linear` except the output head, modules kept in float32, and modules that a
    ``skip`` pattern matches (see `matches`). Raises `UsageError` for a pattern that matches no Linear.
    """
    import torch
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    never = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    unused = set(skip or ())
    decisions: dict[str, Decision] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if isinstance(module, torch.nn.Linear) and name == "weight":
                hit = [pattern for pattern in skip or () if matches(pattern, module_name)]
                unused.difference_update(hit)
                if hit:
                    decisions[full] = Decision(None, "skipped as asked", linear=True)
                elif not should_convert_module(full, never):
                    decisions[full] = Decision(None, "output head or kept in float32", linear=True)
                else:
                    problem = misfit(scheme, *parameter.shape)
                    fits = Decision(scheme, "linear weight", linear=True)
                    decisions[full] = Decision(None, problem, linear=True, misfit=True) if problem else fits
            elif parameter.dim() == 3:
                decisions[full] = Decision(None, "fused experts (3-D): torchao quantizes 2-D weights only")
            elif isinstance(module, torch.nn.Embedding):
                decisions[full] = Decision(None, "embedding")
            elif parameter.dim() == 2:
                decisions[full] = Decision(None, f"weight of a {type(module).__name__}, not a Linear")
    if unused:
        raise UsageError(
            f"--skip {sorted(unused)[0]} matches no Linear of {type(model).__name__}",
            "Patterns: a module name or part of it (mlp, layers.0, down_proj), a glob, or re:REGEX",
        )
    return decisions


def matches(pattern: str, module: str) -> bool:
    """Whether a rule's pattern names a module: ``re:`` regex of the whole name, glob, or a run of its dotted parts."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], module) is not None
    return fnmatchcase(module, pattern) or f".{pattern}." in f".{module}."


def misfit(scheme: Scheme, out_features: int, in_features: int) -> str:
    """Why a weight of this shape cannot take ``scheme``; empty when it can."""
    match scheme:
        case (
            Int8DynActIntxWeight(group_size=group)
            | IntxWeightOnly(group_size=group)
            | Int4WeightOnly(group_size=group)
        ):
            if group and in_features % group:
                return f"{in_features} input features are no multiple of the group size {group}"
        case Nvfp4WeightOnly() | Nvfp4DynActNvfp4Weight():
            if in_features % 16 or out_features % 16:
                return f"shape {out_features}x{in_features} is no multiple of 16"
        case MxDynActMxWeight():
            if in_features % 32 or out_features % 32:
                return f"shape {out_features}x{in_features} is no multiple of 32"
    return ""

"""Which parameters are quantized: transformers' own rule for torchao, so that a stock reload agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    Quantized are the weights of `nn.Linear` except the output head, modules kept in float32, and names that ``skip``
    (transformers' ``modules_to_not_convert`` patterns) matches.
    """
    import torch
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    never = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    decisions: dict[str, Decision] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if isinstance(module, torch.nn.Linear) and name == "weight":
                if skip and not should_convert_module(full, skip):
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
    return decisions


def misfit(scheme: Scheme, out_features: int, in_features: int) -> str:
    """Why a weight of this shape cannot take ``scheme``; empty when it can."""
    match scheme:
        case Int8DynActIntxWeight(group_size=group) | IntxWeightOnly(group_size=group) | Int4WeightOnly(group_size=group):
            if group and in_features % group:
                return f"{in_features} input features are no multiple of the group size {group}"
        case Nvfp4WeightOnly() | Nvfp4DynActNvfp4Weight():
            if in_features % 16 or out_features % 16:
                return f"shape {out_features}x{in_features} is no multiple of 16"
        case MxDynActMxWeight():
            if in_features % 32 or out_features % 32:
                return f"shape {out_features}x{in_features} is no multiple of 32"
    return ""

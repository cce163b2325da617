"""Which parameters are quantized: transformers' own rule for torchao, so that a stock reload agrees."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from loadstone.errors import UsageError
from loadstone.quantization.recipe_file import MixedRecipe, Rule
from loadstone.quantization.schemes import (
    Float8DynActFloat8Weight,
    Float8DynActInt4Weight,
    Float8WeightOnly,
    Int4WeightOnly,
    Int8DynActInt8Weight,
    Int8DynActIntxWeight,
    Int8WeightOnly,
    IntxWeightOnly,
    MxDynActMxWeight,
    Nvfp4DynActNvfp4Weight,
    Nvfp4WeightOnly,
    Recipe,
    Scheme,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


KEPT = "output head or kept in float32"
FUSED = "fused experts"


@dataclass(frozen=True)
class Decision:
    """What happens to one parameter: a scheme, or None and the reason it stays as it is.

    ``linear``: the weight of a Linear; ``misfit``: its shape cannot take the scheme; ``table``: the input embeddings
    or the output head; ``fused``: a 3-D weight of all experts of a layer.
    """

    scheme: Scheme | None
    reason: str
    linear: bool = False
    misfit: bool = False
    table: bool = False
    fused: bool = False


def decide(
    model: PreTrainedModel, recipe: Recipe | MixedRecipe, skip: list[str] | None = None
) -> dict[str, Decision]:
    """A decision for each matrix weight of ``model`` (on the meta device).

    A plain recipe quantizes the weights of `nn.Linear`, and fused experts where torchao can (see `fused_misfit`),
    except the output head, modules kept in float32, and modules that a ``skip`` pattern matches (see `matches`). A
    mixed one chooses by its rules, and may name embeddings and head. Raises `UsageError` for a pattern or rule that
    matches no Linear and no experts.
    """
    import torch

    mixed = recipe if isinstance(recipe, MixedRecipe) else MixedRecipe(recipe)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    never = _never(model, head if mixed.lm_head else None)
    used: set[str | Rule] = set()
    decisions: dict[str, Decision] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if isinstance(module, torch.nn.Linear) and name == "weight":
                shape = tuple(parameter.shape)
                decisions[full] = _decide_linear(
                    module_name, shape, mixed, skip or [], never, module is head, used
                )
            elif parameter.dim() == 3:
                decisions[full] = _decide_fused(full, module, mixed, skip or [], never, used)
            elif isinstance(module, torch.nn.Embedding):
                chosen = mixed.embeddings if module is table else None
                decisions[full] = _fitting(chosen, tuple(parameter.shape), "embedding", table=module is table)
            elif parameter.dim() == 2:
                decisions[full] = Decision(None, f"weight of a {type(module).__name__}, not a Linear")
    _check_used(model, mixed, skip or [], used)
    return decisions


def _decide_linear(
    module: str,
    shape: tuple[int, ...],
    mixed: MixedRecipe,
    skip: list[str],
    never: list[str],
    is_head: bool,
    used: set[str | Rule],
) -> Decision:
    from transformers.quantizers.quantizers_utils import should_convert_module

    hit = [pattern for pattern in skip if matches(pattern, module)]
    used.update(hit)
    # The head is named by the key lm_head alone: `re:.*` should not untie it by accident.
    rules = [] if is_head else [rule for rule in mixed.rules if matches(rule.modules, module)]
    # A rule that an earlier one always forestalls matches all the same: only a pattern that names nothing is wrong.
    used.update(rules)
    if hit:
        return Decision(None, "skipped as asked", linear=True, table=is_head)
    if not should_convert_module(f"{module}.weight", never):
        return Decision(None, KEPT, linear=True, table=is_head)
    if is_head:
        return _fitting(mixed.lm_head, shape, "output head", linear=True, table=True)
    recipe = rules[0].recipe if rules else mixed.default
    if recipe is None:
        return Decision(None, "skipped as asked", linear=True)
    return _fitting(recipe, shape, "linear weight", linear=True)


def _decide_fused(
    name: str,
    module: torch.nn.Module,
    mixed: MixedRecipe,
    skip: list[str],
    never: list[str],
    used: set[str | Rule],
) -> Decision:
    """A 3-D parameter: experts of transformers' own kind, (experts, out, in), are quantized row by row."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    def named(pattern: str) -> bool:
        return matches(pattern, name) or matches(pattern, name.rpartition(".")[0])

    hit = [pattern for pattern in skip if named(pattern)]
    used.update(hit)
    rules = [rule for rule in mixed.rules if named(rule.modules)]
    used.update(rules)
    recipe = rules[0].recipe if rules else mixed.default
    if hit or recipe is None:
        return Decision(None, "skipped as asked", fused=True)
    if not should_convert_module(name, never):
        return Decision(None, KEPT, fused=True)
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        return Decision(
            None, f"3-D weight of a {type(module).__name__}, whose products are its own", fused=True
        )
    if transposed:
        return Decision(None, f"{FUSED}: stored (in, out), and torchao multiplies (out, in)", fused=True)
    problem = fused_misfit(recipe.scheme)
    return Decision(
        None if problem else recipe.scheme, f"{FUSED}: {problem}" if problem else FUSED, fused=True
    )


def fused_misfit(scheme: Scheme) -> str:
    """Why 3-D weights are not quantized by ``scheme`` (torchao 0.18); empty for float8 with a scale for each row.

    transformers multiplies fused experts by ``grouped_mm``, which of torchao's tensors Float8Tensor alone implements.
    """
    match scheme:
        case Float8WeightOnly(granularity="row") | Float8DynActFloat8Weight(granularity="row"):
            return ""
        case Float8WeightOnly() | Float8DynActFloat8Weight():
            return "one scale for the whole tensor would need all of them at once"
        case Int8WeightOnly() | Int8DynActInt8Weight():
            return "torchao's int8 tensors have no grouped product"
        case IntxWeightOnly() | Int8DynActIntxWeight():
            return "torchao's intx tensors are 2-D"
        case Int4WeightOnly() | Float8DynActInt4Weight():
            return "torchao's int4 tensors have no grouped product"
        case Nvfp4WeightOnly() | Nvfp4DynActNvfp4Weight():
            return "torchao's NVFP4 configs take weights of Linears only"
        case MxDynActMxWeight():
            return "torchao's MX configs take 2-D weights only"
    return "torchao has no fused weights of this scheme"


def _fitting(
    recipe: Recipe | None, shape: tuple[int, ...], what: str, *, linear: bool = False, table: bool = False
) -> Decision:
    problem = misfit(recipe.scheme, *shape) if recipe else ""
    if problem:
        return Decision(None, problem, linear, misfit=True, table=table)
    return Decision(recipe.scheme if recipe else None, what, linear, table=table)


def _never(model: PreTrainedModel, wanted: torch.nn.Module | None) -> list[str]:
    """transformers' names of what is never quantized: the output head, unless ``wanted``, and what stays float32."""
    from transformers.quantizers.base import HfQuantizer

    kept = model._keep_in_fp32_modules
    if wanted is None:
        return HfQuantizer.get_modules_to_not_convert(model, None, kept)
    return list(kept or ())


def _check_used(model: PreTrainedModel, mixed: MixedRecipe, skip: list[str], used: set[str | Rule]) -> None:
    patterns = "Patterns: a module name or part of it (mlp, layers.0, down_proj), a glob, or re:REGEX"
    for rule in mixed.rules:
        if rule not in used and any(
            matches(rule.modules, name)
            for name, m in model.named_modules()
            if m is model.get_output_embeddings()
        ):
            raise UsageError(
                f"{mixed.where(rule)}: '{rule.modules}' is the output head, which rules leave alone",
                "Name its recipe under lm_head:",
            )
        if rule not in used:
            raise UsageError(
                f"{mixed.where(rule)}: '{rule.modules}' matches no Linear of {type(model).__name__}", patterns
            )
    for pattern in sorted(set(skip) - used):
        raise UsageError(f"--skip {pattern} matches no Linear of {type(model).__name__}", patterns)
    table = model.get_input_embeddings()
    if mixed.embeddings and table is not None and any(True for _ in table.buffers()):
        # transformers marks a module with a deserialised weight as initialised, and never fills its buffers.
        raise UsageError(
            f"{mixed.file}: embeddings of {type(model).__name__} cannot be quantized: transformers would lose the "
            f"scale that {type(table).__name__} keeps beside them",
            "Remove embeddings",
        )
    if mixed.lm_head and model.get_output_embeddings() is None:
        raise UsageError(f"{mixed.file}: {type(model).__name__} has no output head", "Remove lm_head")


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
        case Nvfp4WeightOnly() | Nvfp4DynActNvfp4Weight() | Float8DynActFloat8Weight():
            if in_features % 16 or out_features % 16:
                return f"shape {out_features}x{in_features} is no multiple of 16"
        case MxDynActMxWeight():
            if in_features % 32 or out_features % 32:
                return f"shape {out_features}x{in_features} is no multiple of 32"
    return ""

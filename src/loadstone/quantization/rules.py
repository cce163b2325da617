"""Decide which parameters are quantized, by transformers' own rule for torchao, so that a stock reload agrees."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from loadstone.errors import UsageError
from loadstone.quantization.model_facts import EMBEDDING, FUSED, LINEAR, ModelFacts, Weight
from loadstone.quantization.recipe_file import MixedRecipe, Rule
from loadstone.quantization.schemes import (
    Recipe,
    Scheme,
)
from loadstone.quantization.yaml_file import check_pattern

NOT_CONVERTED = "output head or kept in float32"
FUSED_EXPERTS = "fused experts"
BY_RULE = "a rule of a recipe file includes it"
# GPT-2's layers: `torch.addmm(bias, x, weight)`, which no tensor of torchao computes, and compressed-tensors refuses.
CONV1D = "weight of a Conv1D, stored (in, out), which torchao and compressed-tensors do not compute"


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
    model: ModelFacts,
    recipe: Recipe | MixedRecipe,
    skip: list[str] | None = None,
    experts_misfit: Callable[[Scheme, Weight], str] | None = None,
) -> dict[str, Decision]:
    """A decision for each matrix weight of ``model``.

    A plain recipe quantizes the weights of `nn.Linear`, and fused experts where torchao can, except the output head,
    modules kept in float32, and modules that a ``skip`` pattern matches (see `matches`). A mixed one chooses by its
    rules, and may name embeddings and head. Raises `UsageError` for a pattern or rule that matches no Linear and no
    experts.

    ``experts_misfit``: why a 3-D weight cannot take a scheme, where experts are stored one by one; None where they are
    stored as torchao and transformers multiply them.
    """
    mixed = recipe if isinstance(recipe, MixedRecipe) else MixedRecipe(recipe)
    for pattern in skip or ():
        check_pattern(pattern, "--skip")
    for rule in mixed.rules:
        check_pattern(rule.modules, mixed.where(rule))
    used: set[str | Rule] = set()
    decisions: dict[str, Decision] = {}
    for weight in model.weights:
        if weight.kind == LINEAR:
            decision = _decide_linear(weight, mixed, skip or [], used)
        elif weight.kind == FUSED:
            decision = _decide_fused(weight, mixed, skip or [], used, experts_misfit)
        elif weight.kind == EMBEDDING:
            chosen = mixed.embeddings if weight.table else None
            decision = _fitting(chosen, weight.shape, "embedding", table=weight.table)
        else:
            plain = f"weight of a {weight.owner}, not a Linear"
            decision = Decision(None, CONV1D if weight.owner == "Conv1D" else plain)
        decisions[weight.name] = decision
    _check_used(model, mixed, skip or [], used)
    return decisions


def instead(reason: str, decisions: dict[str, Decision]) -> str:
    """What to do where no weight is quantized, mostly for ``reason``."""
    if CONV1D in reason:
        return "Finalize it without --quantize, or store rounded values (loadstone export-fakequant)"
    if BY_RULE in reason:
        return "Name its modules by rules in a recipe file (--recipe), or finalize it without --quantize"
    if "(--dtype)" in reason:
        return "Pass --dtype float32 or another, or finalize it without --quantize"
    if any(decision.misfit for decision in decisions.values()):
        return "Choose another group size or recipe, or finalize it without --quantize"
    return "Finalize it without --quantize"


def _decide_linear(weight: Weight, mixed: MixedRecipe, skip: list[str], used: set[str | Rule]) -> Decision:
    hit = [pattern for pattern in skip if matches(pattern, weight.module)]
    used.update(hit)
    # Only the key lm_head names the head: `re:.*` should not untie it by accident.
    rules = [] if weight.head else [rule for rule in mixed.rules if matches(rule.modules, weight.module)]
    # A rule may match only what earlier rules decide already: only a pattern that matches nothing is an error.
    used.update(rules)
    if hit:
        return Decision(None, "skipped as asked", linear=True, table=weight.head)
    if _is_excluded(weight, mixed):
        return Decision(None, NOT_CONVERTED, linear=True, table=weight.head)
    if weight.used_otherwise:
        return Decision(None, weight.used_otherwise, linear=True, table=weight.head)
    if weight.head:
        return _fitting(mixed.lm_head, weight.shape, "output head", linear=True, table=True)
    recipe = rules[0].recipe if rules else mixed.default
    if recipe is None:
        return Decision(None, "skipped as asked", linear=True)
    if weight.outside and not rules:
        return Decision(None, f"{weight.outside}; {BY_RULE}", linear=True)
    return _fitting(recipe, weight.shape, "linear weight", linear=True)


def _is_excluded(weight: Weight, mixed: MixedRecipe) -> bool:
    """Whether transformers never quantizes this weight: what stays float32, and the output head unless it is wanted."""
    return weight.float32_only if mixed.lm_head else weight.excluded


def _decide_fused(
    weight: Weight,
    mixed: MixedRecipe,
    skip: list[str],
    used: set[str | Rule],
    experts_misfit: Callable[[Scheme, Weight], str] | None,
) -> Decision:
    """A 3-D parameter: experts of transformers' own kind, (experts, out, in), are quantized row by row."""

    def named(pattern: str) -> bool:
        return matches(pattern, weight.name) or matches(pattern, weight.module)

    hit = [pattern for pattern in skip if named(pattern)]
    used.update(hit)
    rules = [rule for rule in mixed.rules if named(rule.modules)]
    used.update(rules)
    recipe = rules[0].recipe if rules else mixed.default
    if hit or recipe is None:
        return Decision(None, "skipped as asked", fused=True)
    if _is_excluded(weight, mixed):
        return Decision(None, NOT_CONVERTED, fused=True)
    if weight.outside and not rules:
        return Decision(None, f"{weight.outside}; {BY_RULE}", fused=True)
    if weight.transposed is None and (experts_misfit is None or weight.experts is None):
        return Decision(None, f"3-D weight of {weight.owner}, which has a matmul of its own", fused=True)
    if weight.transposed and experts_misfit is None:
        return Decision(
            None, f"{FUSED_EXPERTS}: stored (in, out), and torchao multiplies (out, in)", fused=True
        )
    scheme = recipe.scheme
    if scheme.calibrated and scheme.input_scale and experts_misfit is None:
        # torchao's 3-D tensors have no scale of inputs.
        scheme = scheme.rounded_by(scheme.algorithms[0])
    problem = experts_misfit(scheme, weight) if experts_misfit else scheme.experts_misfit()
    return Decision(
        None if problem else scheme,
        f"{FUSED_EXPERTS}: {problem}" if problem else FUSED_EXPERTS,
        misfit=bool(problem),
        fused=True,
    )


def _fitting(
    recipe: Recipe | None, shape: tuple[int, ...], what: str, *, linear: bool = False, table: bool = False
) -> Decision:
    problem = _misfit(recipe.scheme, shape) if recipe else ""
    if problem:
        return Decision(None, problem, linear, misfit=True, table=table)
    return Decision(recipe.scheme if recipe else None, what, linear, table=table)


def _misfit(scheme: Scheme, shape: tuple[int, ...]) -> str:
    """Why a matrix (out, in) cannot be quantized; empty when it can."""
    return scheme.misfit(*shape) if all(shape) else f"shape {'x'.join(map(str, shape))} has no values"


def _check_used(model: ModelFacts, mixed: MixedRecipe, skip: list[str], used: set[str | Rule]) -> None:
    patterns = "Patterns: a module name or part of it (mlp, layers.0, down_proj), a glob, or re:REGEX"
    for rule in mixed.rules:
        if rule not in used and model.head is not None and matches(rule.modules, model.head):
            raise UsageError(
                f"{mixed.where(rule)}: '{rule.modules}' is the output head, which rules leave alone",
                "Name its recipe under lm_head:",
            )
        if rule not in used:
            raise UsageError(
                f"{mixed.where(rule)}: '{rule.modules}' matches no Linear of {model.model}", patterns
            )
    for pattern in sorted(set(skip) - used):
        raise UsageError(f"--skip {pattern} matches no Linear of {model.model}", patterns)
    if mixed.embeddings and model.table_has_buffers:
        # transformers marks a module with a deserialised weight as initialised, and never fills its buffers.
        raise UsageError(
            f"{mixed.file or 'the recipe'}: embeddings of {model.model} cannot be quantized: transformers would lose "
            f"the scale that {model.table} keeps beside them",
            "Remove embeddings",
        )
    if mixed.lm_head and model.head is None:
        raise UsageError(f"{mixed.file or 'the recipe'}: {model.model} has no output head", "Remove lm_head")


def matches(pattern: str, module: str) -> bool:
    """Whether a rule's pattern names a module: ``re:`` regex of the whole name, glob, or a run of its dotted parts."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], module) is not None
    return fnmatchcase(module, pattern) or f".{pattern}." in f".{module}."

"""Which weights are folded and how: a default format, and rules by module name. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadstone.errors import UsageError
from loadstone.fakequant.formats.spec import Format, misfit, parse_format
from loadstone.quantization.rules import matches
from loadstone.quantization.yaml_file import mapping, pattern, place, read_yaml, rules_in, text

NONE = "none"


@dataclass(frozen=True)
class Rule:
    """``match``: a module name or a run of its dotted parts, a glob, or ``re:REGEX``; ``format`` None
    leaves it."""

    match: str
    format: Format | None
    where: str = "rule"

    def __str__(self) -> str:
        return f"{self.match}: {self.format or NONE}"


@dataclass(frozen=True)
class RuleSet:
    """``default`` goes to every Linear and expert but the output head; the first rule that matches goes
    before it, and before both what ``own`` says of a stored name (the model's own quantizers)."""

    default: Format | None
    rules: tuple[Rule, ...] = ()
    own: Mapping[str, Format] = field(default_factory=dict, repr=False)

    @property
    def formats(self) -> tuple[Format, ...]:
        found = [self.default, *(rule.format for rule in self.rules)]
        return tuple(dict.fromkeys(f for f in found if f is not None))

    def __str__(self) -> str:
        count = len(self.rules) + len(self.own)
        return str(self.default or NONE) + (f" with {count} rules" if count else "")


@dataclass(frozen=True)
class Decision:
    """The format of one weight, or None and the reason; ``rule`` is the rule that decided."""

    format: Format | None
    reason: str = ""
    rule: Rule | None = None


@dataclass(frozen=True)
class Role:
    """What a stored tensor is in its model. ``eligible``: the default format goes to it; ``reason``: why it
    does not.

    ``matrix``: whether a rule may name it; ``transposed``: stored as (…, in, out); ``inputs``: whether its
    layer's input can be seen on its own, as that of a Linear; ``shared``: for an expert, the quantizer of inputs
    that all experts of its layer have in common.
    """

    eligible: bool
    reason: str = ""
    matrix: bool = True
    transposed: bool = False
    inputs: bool = False
    shared: str = ""


def module_of(key: str) -> str:
    """``model.layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj``."""
    return key.removesuffix(".weight")


def decide(rules: RuleSet, roles: dict[str, tuple[Role, tuple[int, ...]]]) -> dict[str, Decision]:
    """A decision for each key; ``roles`` holds each tensor's role and shape.

    Raises `UsageError` for a rule that decides nothing.
    """
    unused = dict.fromkeys(rules.rules)
    decisions: dict[str, Decision] = {}
    for key, (role, shape) in roles.items():
        if key in rules.own:
            found = rules.own[key]
            decisions[key] = Decision(found, rule=Rule(module_of(key), found, "quantizer"))
            continue
        if not role.matrix:
            decisions[key] = Decision(None, role.reason)
            continue
        rule = next((r for r in rules.rules if matches(r.match, module_of(key))), None)
        if rule is not None:
            unused.pop(rule, None)
            # What a rule asks for by name and cannot have is an error when it is folded, not passed over
            # here.
            decisions[key] = Decision(rule.format, "" if rule.format else "left out by a rule", rule)
        elif not role.eligible or rules.default is None:
            decisions[key] = Decision(None, role.reason or "no rule names it")
        else:
            problem = misfit(rules.default.weight, _as_linear(shape, role))
            decisions[key] = Decision(None, problem) if problem else Decision(rules.default)
    for rule in unused:
        raise UsageError(
            f"{rule.where}: the rule '{rule}' decides about no weight",
            "It matches none, or earlier rules match all of them. Patterns: a module name or a run of its parts, "
            "a glob, or re:REGEX",
        )
    return decisions


def _as_linear(shape: tuple[int, ...], role: Role) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if role.transposed else shape


def read_rules(path: Path, default: Format | None = None) -> RuleSet:
    """Rules from a YAML file: ``format:`` (the default, which ``default`` overrides) and ``rules:``, a list
    of ``match`` and ``format`` pairs. Raises `UsageError` with the line of what is wrong."""
    root = read_yaml(path, "rules file", _EXAMPLE)
    values = mapping(path, root, ("format", "rules"), "a rules file") if root is not None else {}
    rules = tuple(
        Rule(pattern(path, match, "match"), _format(path, chosen), place(path, rule))
        for rule, match, chosen in rules_in(path, values.get("rules"), ("match", "format"))
    )
    own = _format(path, values["format"]) if "format" in values else None
    if (default or own) is None and not any(rule.format for rule in rules):
        raise UsageError(f"{path}: no format is named, so nothing would be folded", _EXAMPLE)
    return RuleSet(default or own, rules)


def _format(path: Path, node: Any) -> Format | None:
    name = text(path, node, "a format", f"a format, or {NONE}")
    if name == NONE:
        return None
    try:
        return parse_format(name)
    except UsageError as error:
        raise UsageError(f"{place(path, node)}: {error.message}", error.remedy) from None


_EXAMPLE = (
    "Example: {format: fp8, rules: [{match: '*.down_proj', format: nvfp4}, {match: layers.0, format: none}]}"
)

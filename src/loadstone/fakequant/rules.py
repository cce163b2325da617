"""Which weights are folded and how: a default format, and rules by module name. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.errors import UsageError
from loadstone.fakequant.formats.spec import Format, misfit, parse_format
from loadstone.quantization.rules import matches

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
    before it."""

    default: Format | None
    rules: tuple[Rule, ...] = ()

    @property
    def formats(self) -> tuple[Format, ...]:
        found = [self.default, *(rule.format for rule in self.rules)]
        return tuple(dict.fromkeys(f for f in found if f is not None))

    def __str__(self) -> str:
        return str(self.default or NONE) + (f" with {len(self.rules)} rules" if self.rules else "")


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight: a format, or None and the reason; ``rule`` is the one that decided."""

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
            problem = misfit(rules.default.weight, _laid(shape, role))
            decisions[key] = Decision(None, problem) if problem else Decision(rules.default)
    for rule in unused:
        raise UsageError(
            f"{rule.where}: the rule '{rule}' decides about no weight",
            "It matches none, or earlier rules match all of them. Patterns: a module name or a run of its parts, "
            "a glob, or re:REGEX",
        )
    return decisions


def _laid(shape: tuple[int, ...], role: Role) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if role.transposed else shape


def read_rules(path: Path, default: Format | None = None) -> RuleSet:
    """Rules from a YAML file: ``format:`` (the default, which ``default`` overrides) and ``rules:``, a list
    of ``match`` and ``format`` pairs. Raises `UsageError` with the line of what is wrong."""
    import yaml

    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"--rules {path}: cannot be read ({error.strerror})", "Check the path") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict) or set(content) - {"format", "rules"}:
        raise UsageError(f"{path}: a rules file holds 'format' and 'rules' only", _EXAMPLE)
    lines = _rule_lines(node)
    entries = content.get("rules") or []
    if not isinstance(entries, list):
        raise UsageError(f"{path}: 'rules' is no list", _EXAMPLE)
    rules = []
    for number, entry in enumerate(entries):
        where = f"{path}:{lines[number]}"
        if not isinstance(entry, dict) or set(entry) != {"match", "format"}:
            raise UsageError(f"{where}: a rule holds 'match' and 'format'", _EXAMPLE)
        rules.append(Rule(str(entry["match"]), _format(entry["format"], where), where))
    chosen = default or _format(content.get("format", NONE), str(path))
    if chosen is None and not any(rule.format for rule in rules):
        raise UsageError(f"{path}: no format is named, so nothing would be folded", _EXAMPLE)
    return RuleSet(chosen, tuple(rules))


def _format(value: Any, where: str) -> Format | None:
    if value is None or value == NONE:
        return None
    try:
        return parse_format(str(value))
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", error.remedy) from None


def _rule_lines(node: Any) -> list[int]:
    for key, value in node.value:
        if key.value == "rules":
            return [item.start_mark.line + 1 for item in value.value if hasattr(item, "start_mark")]
    return []


_EXAMPLE = (
    "Example: {format: fp8, rules: [{match: '*.down_proj', format: nvfp4}, {match: layers.0, format: none}]}"
)

"""Recipe files: a scheme for each module by rules, read from YAML. Every complaint names the file and the line."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadstone.errors import UsageError
from loadstone.quantization.schemes import (
    RECIPES,
    IntxWeightOnly,
    Recipe,
    parse_recipe,
    round_by,
    rounding_choices,
)

SKIP = "skip"

# The YAML text of a recipe file is a page or two: a larger file is something else.
_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Rule:
    """Linears whose name ``modules`` matches take ``recipe`` (None: left as they are). ``line`` is 0 outside files."""

    modules: str
    recipe: Recipe | None
    line: int = 0


@dataclass(frozen=True)
class MixedRecipe:
    """A recipe by module: the first rule that matches, else ``default``; embeddings and output head on their own.

    None leaves weights as they are.
    """

    default: Recipe | None
    rules: tuple[Rule, ...] = ()
    embeddings: Recipe | None = None
    lm_head: Recipe | None = None
    file: str = ""

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Every recipe it names, each once."""
        named = (self.default, *(rule.recipe for rule in self.rules), self.embeddings, self.lm_head)
        return tuple(dict.fromkeys(recipe for recipe in named if recipe is not None))

    def where(self, rule: Rule) -> str:
        """The place of a rule, for messages."""
        return f"{self.file}:{rule.line}" if rule.line else f"rule '{rule.modules}'"

    def __str__(self) -> str:
        """All that decides the result, in one line: `read_recipe` files of equal meaning give equal text."""
        parts = [*(f"{rule.modules} = {rule.recipe or SKIP}" for rule in self.rules)]
        parts.append(f"default = {self.default or SKIP}")
        parts += [
            f"{key} = {value}"
            for key, value in (("embeddings", self.embeddings), ("lm_head", self.lm_head))
            if value
        ]
        return str(self.default) if self == MixedRecipe(self.default, file=self.file) else "; ".join(parts)


def read_recipe(path: str | Path) -> MixedRecipe:
    """A recipe file. Raises `UsageError` naming file and line for anything that is not as `docs/recipes.md` says."""
    import yaml

    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"'{path}' is no recipe file: it is larger than 1 MB", "See docs/recipes.md")
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UsageError(f"there is no recipe file '{path}'", "See recipes/ for examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe file '{path}' cannot be read ({error})", "Check the path") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "no YAML"
        raise UsageError(f"{path}{line}: {problem}", "See docs/recipes.md for the form") from None
    if root is None:
        raise UsageError(f"{path}: empty", "It needs at least `default: RECIPE`")
    values = _mapping(path, root, ("default", "rules", "embeddings", "lm_head"), "a recipe file")
    if "default" not in values:
        raise UsageError(f"{path}: no default", "Add `default: RECIPE`, or `default: skip`")
    mixed = MixedRecipe(
        default=_recipe(path, values["default"]),
        rules=tuple(_rule(path, node) for node in _sequence(path, values.get("rules"))),
        embeddings=_embeddings(path, values.get("embeddings")),
        lm_head=_recipe(path, values["lm_head"]) if "lm_head" in values else None,
        file=str(path),
    )
    if not mixed.recipes:
        raise UsageError(f"{path}: everything is skipped", "Name a recipe for some modules")
    return mixed


def recipes_in(recipe: Recipe | MixedRecipe | None) -> tuple[Recipe, ...]:
    """Every recipe that a plain or mixed one uses."""
    return recipe.recipes if isinstance(recipe, MixedRecipe) else (recipe,) if recipe else ()


def with_algorithm(recipe: Recipe | MixedRecipe, algorithm: str) -> Recipe | MixedRecipe:
    """The recipe with another way of rounding weights, wherever its schemes have one.

    Raises `UsageError` for an unknown algorithm, and when no scheme of the recipe has a choice.
    """
    if not any(rounding_choices(each.scheme) for each in recipes_in(recipe)):
        able = [r.name for r in RECIPES.values() if rounding_choices(r.scheme)]
        raise UsageError(
            f"--algorithm {algorithm}: {recipe} has one way of rounding only",
            f"Those with a choice: {', '.join(able)}",
        )
    if isinstance(recipe, Recipe):
        return round_by(recipe, algorithm)

    if not any(algorithm in ("affine", *rounding_choices(each.scheme)) for each in recipes_in(recipe)):
        raise UsageError(
            f"--algorithm {algorithm} is possible with nothing in {recipe}", "See docs/recipes.md"
        )

    def changed(each: Recipe | None) -> Recipe | None:
        able = each and rounding_choices(each.scheme)
        return round_by(each, algorithm) if each and able and algorithm in ("affine", *able) else each

    return replace(
        recipe,
        default=changed(recipe.default),
        rules=tuple(replace(rule, recipe=changed(rule.recipe)) for rule in recipe.rules),
        embeddings=changed(recipe.embeddings),
        lm_head=changed(recipe.lm_head),
    )


def check_pattern(pattern: str, where: str) -> None:
    """Raise `UsageError` for a ``re:`` pattern that is no regular expression."""
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error as error:
        raise UsageError(
            f"{where}: '{pattern}' is no regular expression ({error})", "Python's re syntax"
        ) from None


def _rule(path: Path, node: Any) -> Rule:
    values = _mapping(path, node, ("modules", "scheme"), "a rule")
    for key in ("modules", "scheme"):
        if key not in values:
            raise UsageError(
                f"{_at(path, node)}: the rule has no {key}", "A rule is {modules: PATTERN, scheme: RECIPE}"
            )
    pattern = _text(path, values["modules"], "modules", "a pattern: mlp, *.down_proj or re:REGEX")
    check_pattern(pattern, _at(path, values["modules"]))
    return Rule(pattern, _recipe(path, values["scheme"]), node.start_mark.line + 1)


def _embeddings(path: Path, node: Any) -> Recipe | None:
    recipe = _recipe(path, node) if node is not None else None
    if recipe is not None and not isinstance(recipe.scheme, IntxWeightOnly):
        raise UsageError(
            f"{_at(path, node)}: embeddings cannot take {recipe}: torchao looks rows up in intx weights only",
            "Use intx4-weight-only, or intx4-weight-only:bits=8,group_size=0",
        )
    return recipe


def _recipe(path: Path, node: Any) -> Recipe | None:
    text = _text(path, node, "a scheme", f"a recipe, or {SKIP}")
    if text == SKIP:
        return None
    try:
        return parse_recipe(text)
    except UsageError as error:
        raise UsageError(f"{_at(path, node)}: {error.message}", error.remedy) from None


def _mapping(path: Path, node: Any, known: tuple[str, ...], what: str) -> dict[str, Any]:
    if node.id != "mapping":
        raise UsageError(
            f"{_at(path, node)}: {what} is a mapping, this is a {node.id}", f"Keys: {', '.join(known)}"
        )
    values: dict[str, Any] = {}
    for key, value in node.value:
        if key.value not in known:
            close = difflib.get_close_matches(str(key.value), known, n=1, cutoff=0.4)
            hint = f"Did you mean '{close[0]}'? " if close else ""
            raise UsageError(
                f"{_at(path, key)}: unknown key '{key.value}'", f"{hint}Keys: {', '.join(known)}"
            )
        if key.value in values:
            raise UsageError(f"{_at(path, key)}: '{key.value}' stands twice", "Keep one")
        values[key.value] = value
    return values


def _sequence(path: Path, node: Any) -> list[Any]:
    if node is None:
        return []
    if node.id != "sequence":
        raise UsageError(
            f"{_at(path, node)}: rules is a list, this is a {node.id}", "Begin each rule with '- '"
        )
    return node.value


def _text(path: Path, node: Any, what: str, wanted: str) -> str:
    if node.id != "scalar" or node.tag != "tag:yaml.org,2002:str" or not node.value.strip():
        found = f"'{node.value}'" if node.id == "scalar" and node.value else f"a {node.id}"
        raise UsageError(f"{_at(path, node)}: {what} is text, this is {found}", f"Write {wanted}")
    return node.value.strip()


def _at(path: Path, node: Any) -> str:
    return f"{path}:{node.start_mark.line + 1}"

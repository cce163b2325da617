"""Recipe files: a scheme for each module by rules, read from YAML. Every error names the file and the line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadstone.errors import UsageError
from loadstone.quantization.schemes import (
    RECIPES,
    Recipe,
    parse_recipe,
    round_by,
)
from loadstone.quantization.yaml_file import mapping, pattern, place, read_yaml, rules_in, text

SKIP = "skip"


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
        """One line with all that decides the result: files of equal meaning give equal text."""
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
    path = Path(path)
    root = read_yaml(path, "recipe file", "See docs/recipes.md for the form, and recipes/ for examples")
    if root is None:
        raise UsageError(f"{path}: empty", "It needs at least `default: RECIPE`")
    values = mapping(path, root, ("default", "rules", "embeddings", "lm_head"), "a recipe file")
    if "default" not in values:
        raise UsageError(f"{path}: no default", "Add `default: RECIPE`, or `default: skip`")
    mixed = MixedRecipe(
        default=_recipe(path, values["default"]),
        rules=tuple(
            Rule(pattern(path, modules, "modules"), _recipe(path, scheme), rule.start_mark.line + 1)
            for rule, modules, scheme in rules_in(path, values.get("rules"), ("modules", "scheme"))
        ),
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
    if not any(each.scheme.algorithms for each in recipes_in(recipe)):
        able = [r.name for r in RECIPES.values() if r.scheme.algorithms]
        raise UsageError(
            f"--algorithm {algorithm}: {recipe} has one way of rounding only",
            f"Those with a choice: {', '.join(able)}",
        )
    if isinstance(recipe, Recipe):
        return round_by(recipe, algorithm)

    if not any(algorithm in ("affine", *each.scheme.algorithms) for each in recipes_in(recipe)):
        raise UsageError(
            f"--algorithm {algorithm} is possible with nothing in {recipe}", "See docs/recipes.md"
        )

    def changed(each: Recipe | None) -> Recipe | None:
        able = each and each.scheme.algorithms
        return round_by(each, algorithm) if each and able and algorithm in ("affine", *able) else each

    return replace(
        recipe,
        default=changed(recipe.default),
        rules=tuple(replace(rule, recipe=changed(rule.recipe)) for rule in recipe.rules),
        embeddings=changed(recipe.embeddings),
        lm_head=changed(recipe.lm_head),
    )


def _embeddings(path: Path, node: Any) -> Recipe | None:
    recipe = _recipe(path, node) if node is not None else None
    if recipe is not None and not recipe.scheme.embeds:
        raise UsageError(
            f"{place(path, node)}: embeddings cannot take {recipe}: torchao looks rows up in intx weights only",
            "Use intx4-weight-only, or intx4-weight-only:bits=8,group_size=0",
        )
    return recipe


def _recipe(path: Path, node: Any) -> Recipe | None:
    name = text(path, node, "a scheme", f"a recipe, or {SKIP}")
    if name == SKIP:
        return None
    try:
        return parse_recipe(name)
    except UsageError as error:
        raise UsageError(f"{place(path, node)}: {error.message}", error.remedy) from None

"""Recipes: their names and options, their torchao configs, and the recipe of a stored tensor."""

from loadstone.quantization.recipe_file import MixedRecipe, Rule, read_recipe
from loadstone.quantization.schemes import (
    RECIPES,
    Recipe,
    Scheme,
    parse_recipe,
    recipe_for,
)
from loadstone.quantization.torchao_config import scheme_of, to_torchao

__all__ = [
    "RECIPES",
    "MixedRecipe",
    "Recipe",
    "Rule",
    "Scheme",
    "parse_recipe",
    "read_recipe",
    "recipe_for",
    "scheme_of",
    "to_torchao",
]

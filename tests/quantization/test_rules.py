"""What is decided about a weight, from facts alone."""

from __future__ import annotations

import pytest

from loadstone.quantization import RECIPES, parse_recipe
from loadstone.quantization.model_facts import LINEAR, ModelFacts, Weight
from loadstone.quantization.rules import decide


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_without_values_stays_plain(recipe: str) -> None:
    """LW-DETR with one point a head has such a Linear."""
    shapes = {"full.weight": (256, 256), "rows.weight": (0, 256), "columns.weight": (256, 0)}
    weights = tuple(
        Weight(name, name.removesuffix(".weight"), "Linear", LINEAR, shape, False, False, False, False, None)
        for name, shape in shapes.items()
    )
    decisions = decide(ModelFacts("Model", weights, {}, None, None, False), parse_recipe(recipe))
    assert decisions["full.weight"].scheme is not None
    for name, shape in (("rows.weight", "0x256"), ("columns.weight", "256x0")):
        assert decisions[name].scheme is None
        assert decisions[name].reason == f"shape {shape} has no values"

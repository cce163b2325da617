from dataclasses import replace

import pytest

from loadstone.errors import UsageError
from loadstone.quantization import RECIPES, parse_recipe, recipe_for
from loadstone.quantization.schemes import Int8DynActIntxWeight, IntxWeightOnly, stored_bits


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_spelled_as_it_parses(name: str) -> None:
    recipe = parse_recipe(name)
    assert str(recipe) == name
    assert recipe_for(recipe.scheme).name == name


def test_options_follow_a_colon() -> None:
    recipe = parse_recipe("intx4-weight-only:group_size=64,mapping=asymmetric")
    assert recipe.scheme == IntxWeightOnly(bits=4, group_size=64, mapping="asymmetric")
    assert parse_recipe(str(recipe)) == recipe
    assert parse_recipe("int8-dynamic-act-int4-weight:group-size=16").scheme == Int8DynActIntxWeight(4, 16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int8-dynamic-act-int4-weights", "int8-dynamic-act-int4-weight"),
        ("nf4", "--list-recipes"),
        ("intx4-weight-only:groups=3", "group_size"),
        ("intx4-weight-only:group_size=many", "whole number"),
        ("intx4-weight-only:group_size=\u00b2", "whole number"),
        (f"intx4-weight-only:group_size={'9' * 5000}", "whole number"),
        ("intx4-weight-only:bits=9", "1 to 8"),
        ("intx4-weight-only:mapping=odd", "symmetric"),
        ("int4-weight-only:group_size=48", "32"),
        ("intx4-weight-only:mapping=asymmetric,rounding=hqq", "symmetric only"),
    ],
)
def test_wrong_recipes_say_what_is_right(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_recipe(text)


def test_four_bits_are_stored_in_eight() -> None:
    assert RECIPES["int8-dynamic-act-int4-weight"].stored_bits() == 8.75
    assert RECIPES["int8-dynamic-act-int4-weight"].nominal_bits == 4
    scheme = replace(RECIPES["intx2-weight-only"].scheme, group_size=0)
    assert stored_bits(scheme, in_features=64, out_features=64) == 8 + 24 / 64

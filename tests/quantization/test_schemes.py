from dataclasses import replace

import pytest

from loadstone.errors import UsageError
from loadstone.quantization import RECIPES, parse_recipe, recipe_for
from loadstone.quantization.scheme import CALIBRATED
from loadstone.quantization.schemes import Int8DynActIntxWeight, IntxWeightOnly


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
    assert scheme.stored_bits(in_features=64, out_features=64) == 8 + 24 / 64


@pytest.mark.parametrize("name", RECIPES)
def test_a_scheme_states_its_facts(name: str) -> None:
    scheme = RECIPES[name].scheme
    assert 0 < scheme.nominal_bits <= scheme.stored_bits(4096, 4096)
    assert scheme.misfit(128, 256) == ""
    assert scheme.algorithm == (scheme.algorithms[0] if scheme.algorithms else "")
    assert not scheme.calibrated and not scheme.scales_inputs
    for algorithm in scheme.algorithms:
        other = scheme.rounded_by(algorithm)
        assert other.algorithm == algorithm and other.calibrated == (algorithm in CALIBRATED)
    # A scale of the whole weight can only follow from known extremes where rows can be quantized in blocks.
    assert scheme.row_multiple or not scheme.whole_extremes


def test_shapes_that_do_not_fit_are_named() -> None:
    assert "group size 32" in RECIPES["intx4-weight-only"].scheme.misfit(64, 48)
    assert "multiple of 16" in RECIPES["nvfp4-weight-only"].scheme.misfit(40, 64)
    assert RECIPES["int8-weight-only"].scheme.misfit(7, 5) == ""
    assert RECIPES["float8-weight-only"].scheme.experts_misfit() == ""
    assert "2-D" in RECIPES["intx4-weight-only"].scheme.experts_misfit()

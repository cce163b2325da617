"""recipe -> torchao config -> tensors -> recipe, for every recipe that runs here and its options."""

import pytest
import torch

from loadstone.artifact import FlatTensor
from loadstone.artifact.torchao.flatten import describe, flatten
from loadstone.errors import ArtifactError, MissingError
from loadstone.quantization import RECIPES, parse_recipe, scheme_of, to_torchao
from loadstone.quantization.quantize import check_runs, quantize_weight, template

ON_CPU = [name for name, recipe in RECIPES.items() if "cpu" in recipe.devices]
OPTIONS = [
    "int8-dynamic-act-int4-weight:group_size=64",
    "int8-dynamic-act-int4-weight:group_size=0",
    "int8-dynamic-act-int4-weight:mapping=asymmetric",
    "intx3-weight-only:group_size=0,mapping=asymmetric",
    "int8-weight-only:granularity=tensor",
    "int8-dynamic-act-int8-weight:granularity=tensor",
    "int8-dynamic-act-int8-weight:act_mapping=asymmetric",
    "float8-weight-only:granularity=tensor",
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("text", ON_CPU + OPTIONS)
def test_round_trip(text: str, dtype: torch.dtype) -> None:
    recipe = parse_recipe(text)
    if text.startswith("mx") and dtype == torch.float32:
        with pytest.raises(MissingError, match="--dtype bfloat16"):
            check_runs(recipe, "cpu", "float32")
        return
    torch.manual_seed(0)
    flat, parts = flatten("m.weight", quantize_weight(torch.randn(64, 128, dtype=dtype), recipe.scheme))
    zero_point = parts.get("zero_point")
    scheme = scheme_of(flat, has_zero_points=zero_point is not None and bool(zero_point.any()))
    assert scheme == recipe.scheme
    assert type(to_torchao(scheme)) is type(to_torchao(recipe.scheme))
    bits = 8 * sum(p.nbytes for p in parts.values()) / (64 * 128)
    expected = recipe.scheme.stored_bits(128, 64, scale_bits=8 * dtype.itemsize)
    # Block-scaled formats pad their scales to tiles of 128x4, which counts at this size only.
    assert bits >= expected - 1e-9 if "fp4" in text or "fp8" in text else bits == pytest.approx(expected)


@pytest.mark.parametrize("text", ON_CPU + OPTIONS)
def test_template_foretells_what_is_stored(text: str) -> None:
    scheme = parse_recipe(text).scheme
    tensor = quantize_weight(torch.randn(64, 128, dtype=torch.bfloat16), scheme)
    real, _ = flatten("template.weight", tensor)
    assert describe(tensor) == real.metadata
    assert template(scheme, (64, 128), "BF16", "cpu") == real


def test_quantize_weight_is_torchaos_own() -> None:
    from torchao.quantization import quantize_

    recipe = parse_recipe("int8-dynamic-act-int4-weight")
    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False, dtype=torch.bfloat16))
    ours = quantize_weight(model[0].weight.detach().clone(), recipe.scheme)
    quantize_(model, to_torchao(recipe.scheme))
    assert torch.equal(ours.qdata, model[0].weight.qdata)
    assert torch.equal(ours.scale, model[0].weight.scale)


def test_configs_leave_inductor_alone() -> None:
    import torch._inductor.config as inductor

    before = (inductor.coordinate_descent_tuning, inductor.force_fuse_int_mm_with_mul)
    for name in ON_CPU:
        quantize_weight(torch.randn(64, 128, dtype=torch.bfloat16), RECIPES[name].scheme)
    assert (inductor.coordinate_descent_tuning, inductor.force_fuse_int_mm_with_mul) == before


@pytest.mark.parametrize("name", ON_CPU)
def test_recipes_for_the_cpu_run_there(name: str) -> None:
    check_runs(RECIPES[name], "cpu", "bfloat16")


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ON_CPU])
def test_recipes_for_cuda_are_refused_on_the_cpu(name: str) -> None:
    with pytest.raises(MissingError, match=f"Use {RECIPES[name].instead}"):
        check_runs(RECIPES[name], "cpu", "bfloat16")


def test_unknown_class_is_named() -> None:
    flat = FlatTensor("m.weight", "AffineQuantizedTensor", {}, {})
    with pytest.raises(ArtifactError, match=r"AffineQuantizedTensor.*quantization_config.*float8"):
        scheme_of(flat)


@pytest.mark.parametrize(
    "recipe", ["intx4-weight-only:group_size=96", "int8-dynamic-act-int4-weight:group_size=4096"]
)
def test_groups_that_do_not_divide_1024(recipe: str) -> None:
    check_runs(parse_recipe(recipe), "cpu", "bfloat16")

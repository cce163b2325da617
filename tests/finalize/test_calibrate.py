"""Rounding: what data-free and calibrated algorithms promise, and that their artifacts are like any other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.cli import main
from loadstone.errors import UsageError
from loadstone.finalize import calibrate as module
from loadstone.finalize import finalize, make_plan
from loadstone.finalize.calibrate import calibrate, gptq
from loadstone.finalize.verify import verify
from loadstone.quantization import parse_recipe, read_recipe
from loadstone.quantization.quantize import quantize_weight
from loadstone.quantization.recipe_file import with_algorithm

TOKENS = torch.arange(3, 35)[None]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, " ".join(err.split())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def weight(rows: int = 48, columns: int = 256) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "recipe",
    [
        "intx4-weight-only",
        "intx3-weight-only:group_size=0",
        "int8-dynamic-act-int4-weight:mapping=asymmetric",
    ],
)
@pytest.mark.parametrize("algorithm", ["mse", "hqq"])
def test_rounding_without_data_lowers_the_error(recipe: str, algorithm: str) -> None:
    plain = parse_recipe(recipe)
    if algorithm == "hqq" and "asymmetric" in recipe:
        with pytest.raises(UsageError, match="symmetric only"):
            with_algorithm(plain, algorithm)
        return
    better = with_algorithm(plain, algorithm)
    errors = [
        (quantize_weight(weight(), r.scheme).dequantize().float() - weight().float()).square().sum()
        for r in (plain, better)
    ]
    assert errors[1] < errors[0]
    assert type(quantize_weight(weight(), better.scheme)) is type(quantize_weight(weight(), plain.scheme))


@pytest.mark.parametrize(
    "recipe",
    [
        "int8-dynamic-act-int4-weight:rounding=mse",
        "int8-dynamic-act-int4-weight:rounding=mse,mapping=asymmetric",
        "int8-dynamic-act-int4-weight:rounding=hqq",
        "intx4-weight-only:rounding=mse",
    ],
)
def test_better_rounding_reloads_like_any_other(
    make_model: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    from transformers import AutoModelForCausalLM

    plan = make_plan(loadstone.detect(make_model("llama-tied")), parse_recipe(recipe))
    finalize(plan, tmp_path / "out")
    assert verify(plan, tmp_path / "out") > 0
    ours, stock = loadstone.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(ours), logits(stock))


@pytest.mark.parametrize(
    "recipe",
    [
        "intx4-weight-only:group_size=32",
        "intx4-weight-only:group_size=96",
        "intx3-weight-only:group_size=0",
        "intx4-weight-only:mapping=asymmetric",
    ],
)
def test_gptq_lowers_the_error_of_the_product(recipe: str) -> None:
    plain = parse_recipe(recipe).scheme
    torch.manual_seed(1)
    w = weight(48, 288)
    inputs = torch.randn(512, 288) @ torch.randn(288, 288) * torch.rand(288)
    found = gptq(w, inputs.t() @ inputs, plain)

    def error(tensor: torch.Tensor) -> float:
        return float((inputs @ (tensor.dequantize().float() - w.float()).t()).square().sum())

    rounded = quantize_weight(w, plain)
    assert error(found) < 0.6 * error(rounded)
    assert (found.scale.shape, found.block_size) == (rounded.scale.shape, rounded.block_size)
    assert found.qdata.abs().max() <= 8


def test_calibrated_artifact_is_like_any_other(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model("llama-tied")
    recipe = with_algorithm(parse_recipe("int8-dynamic-act-int4-weight"), "gptq")
    torch.manual_seed(0)
    rows = torch.randint(3, 250, (8, 64))
    plan = make_plan(loadstone.detect(source), recipe)
    with pytest.raises(UsageError, match="--calibrate"):
        finalize(plan, tmp_path / "none")
    ready = calibrate(plan, rows, tmp_path / "work")
    assert {bool(s.ready) for s in ready.steps if s.scheme} == {True}
    finalize(ready, tmp_path / "out")
    assert verify(ready, tmp_path / "out") > 0
    ours = loadstone.load(tmp_path / "out")
    assert torch.equal(logits(ours), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    # Nearer to the source than plain rounding, on the text it was calibrated with.
    finalize(
        make_plan(loadstone.detect(source), parse_recipe("int8-dynamic-act-int4-weight")), tmp_path / "plain"
    )
    with torch.inference_mode():
        wanted = loadstone.load(source)(rows).logits.float()
        errors = [
            (loadstone.load(tmp_path / name)(rows).logits.float() - wanted).square().mean()
            for name in ("plain", "out")
        ]
    assert errors[1] < errors[0]
    # A second run takes the finished layers over, and other tokens do not.
    monkeypatch.setattr(module, "gptq", lambda *args: pytest.fail("rounded again"))
    assert calibrate(plan, rows, tmp_path / "work") == ready
    with pytest.raises(pytest.fail.Exception):
        calibrate(plan, rows + 1, tmp_path / "work")


@pytest.mark.parametrize("arch", ["gemma2", "qwen3", "llama-untied"])
def test_layers_run_one_by_one_as_in_the_model(
    make_model: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    source = make_model(arch, "float32")
    recipe = parse_recipe("intx4-weight-only:bits=8,rounding=gptq")
    plan = calibrate(make_plan(loadstone.detect(source), recipe), TOKENS, tmp_path / "work")
    finalize(plan, tmp_path / "out")
    distance = (logits(loadstone.load(tmp_path / "out")) - logits(loadstone.load(source))).abs().max()
    assert distance < 0.05


def test_the_command_calibrates(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a stone that knew the way. " * 100)
    start = ["finalize", "-M", tiny, "-o", tmp_path / "out", "--quantize"]
    code, out, err = run(capsys, *start, "intx4-weight-only", "--calibrate", text, "--json")
    assert code == 0, err
    assert json.loads(out)["recipe"] == "intx4-weight-only:rounding=gptq"
    assert {p.name for p in tmp_path.iterdir()} == {"text.txt", "out"}
    code, _, err = run(capsys, *start, "intx4-weight-only", "--overwrite", "--algorithm", "gptq")
    assert code == 2 and "needs text" in err
    code, _, err = run(capsys, *start, "int8-weight-only", "--overwrite", "--calibrate", text)
    assert code == 2 and "one way of rounding only" in err


def test_algorithm_goes_to_every_recipe_that_has_a_choice(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("default: int8-weight-only\nrules: [{modules: mlp, scheme: intx4-weight-only}]\n")
    mixed = with_algorithm(read_recipe(file), "hqq")
    assert [str(r) for r in mixed.recipes] == ["int8-weight-only", "intx4-weight-only:rounding=hqq"]
    assert str(with_algorithm(parse_recipe("int4-weight-only"), "affine")) == "int4-weight-only"
    with pytest.raises(UsageError, match="--algorithm gptq is not possible with int4-weight-only"):
        with_algorithm(parse_recipe("int4-weight-only"), "gptq")

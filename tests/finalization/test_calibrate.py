"""Rounding: what data-free and calibrated algorithms promise, and that their artifacts are like any other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import TOKENS, logits, run

import loadstone
from loadstone.errors import ArtifactError, MissingError, UsageError
from loadstone.finalization import calibrate as module
from loadstone.finalization import round_layer
from loadstone.finalization.calibrate import calibrate, calibrated, calibration_folder
from loadstone.finalization.gptq import gptq
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.finalization.smooth import awq_scale, find_folds, smooth_scale
from loadstone.finalization.statistics import Inputs
from loadstone.finalization.verify import verify
from loadstone.quantization import parse_recipe, read_recipe
from loadstone.quantization.quantize import dense, quantize_scaled, quantize_weight
from loadstone.quantization.recipe_file import with_algorithm
from loadstone.ranks import Ranks


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
    write_plan(plan, tmp_path / "out")
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
    (found,) = gptq([w], inputs.t() @ inputs, plain)

    def error(tensor: torch.Tensor) -> float:
        return float((inputs @ (tensor.dequantize().float() - w.float()).t()).square().sum())

    rounded = quantize_weight(w, plain)
    assert error(found) < 0.6 * error(rounded)
    assert (found.scale.shape, found.block_size) == (rounded.scale.shape, rounded.block_size)
    assert found.qdata.abs().max() <= 8


def outlying(rows: int, columns: int) -> torch.Tensor:
    """Inputs of which a few features are far larger than the rest, as in trained models."""
    torch.manual_seed(1)
    size = torch.ones(columns)
    size[::17] = 30
    return torch.randn(rows, columns) * size


@pytest.mark.parametrize("recipe", ["intx4-weight-only", "int8-weight-only"])
def test_awq_chooses_torchaos_scale(recipe: str) -> None:
    """From moments, what torchao's observer finds by keeping all inputs."""
    from torchao.prototype.awq.core import AWQObserver

    from loadstone.quantization import to_torchao

    scheme = parse_recipe(recipe).scheme
    w, x = weight(48, 128).float(), outlying(512, 128)
    observer = AWQObserver(w, None, to_torchao(scheme))
    observer(x, None)
    expected = observer.calculate_qparams()
    assert expected.std() > 0.1
    assert torch.allclose(awq_scale(Inputs.of(x), [(w, scheme)]), expected, rtol=1e-4)


def test_smoothquant_is_torchaos() -> None:
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import quantize_

    from loadstone.quantization import to_torchao

    scheme = parse_recipe("int8-dynamic-act-int8-weight").scheme
    linear = torch.nn.Linear(128, 48, bias=False, dtype=torch.bfloat16)
    w, x = linear.weight.detach().clone(), outlying(256, 128).bfloat16()
    model = torch.nn.Sequential(linear)
    quantize_(model, SmoothQuantConfig(to_torchao(scheme), "prepare"))
    with torch.no_grad():
        model(x)
    quantize_(model, SmoothQuantConfig(to_torchao(scheme), "convert"))
    expected = model[0].weight
    ours = quantize_scaled(w, scheme, smooth_scale(Inputs.of(x), [(w, scheme)]))
    # torchao takes the powers in bfloat16, ours in float32.
    assert torch.allclose(ours.act_pre_scale.float(), expected.act_pre_scale.float(), rtol=0.02)
    error = [(dense(t).float() - w.float()).square().mean() for t in (ours, expected)]
    assert error[0] < 1.05 * error[1]
    with torch.no_grad():
        linear.weight = torch.nn.Parameter(ours, requires_grad=False)
        plain = torch.nn.functional.linear(x, quantize_weight(w, scheme))
        exact = x.float() @ w.float().t()
        smoothed = linear(x)
    assert (smoothed - exact).square().mean() < 0.5 * (plain - exact).square().mean()


FOLDS = {
    "llama-tied": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"},
    "qwen2": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"},
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm", "self_attn.v_proj", "mlp.up_proj"},
}


@pytest.mark.parametrize("arch", FOLDS)
@pytest.mark.parametrize("algorithm", ["awq", "smoothquant"])
def test_scales_are_folded_into_what_comes_before(
    make_model: Callable[..., Path], tmp_path: Path, arch: str, algorithm: str
) -> None:
    """8-bit rounding leaves only what folding changes: the model computes as before, with other norms."""
    source = make_model(arch, "float32")
    recipe = parse_recipe(f"int8-dynamic-act-intx-weight:rounding={algorithm}")
    torch.manual_seed(0)
    plan = calibrate(
        make_plan(loadstone.detect(source), recipe), torch.randint(3, 250, (4, 64)), tmp_path / "out"
    )
    changed = {s.name for s in plan.steps if s.ready and not s.scheme}
    norms = {f"model.layers.{n}.{name}.weight" for n in (0, 1) for name in FOLDS[arch] if "norm" in name}
    assert changed == norms if algorithm == "smoothquant" else changed <= norms
    write_plan(plan, tmp_path / "out")
    plain = parse_recipe("int8-dynamic-act-intx-weight")
    write_plan(make_plan(loadstone.detect(source), plain), tmp_path / "plain")
    wanted = logits(loadstone.load(source))
    distances = [
        float((logits(loadstone.load(tmp_path / name)) - wanted).abs().max()) for name in ("out", "plain")
    ]
    assert distances[0] < 2 * distances[1] + 0.01


@pytest.mark.parametrize("arch", FOLDS)
def test_folds_are_found_and_proven(make_model: Callable[..., Path], arch: str) -> None:
    model = loadstone.load(make_model(arch, "float32"))
    layer = model.model.layers[0]
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    names = [n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)]
    x = torch.randn(1, 8, 64)
    position = model.model.rotary_emb(x, torch.arange(8)[None])
    rope = position if not isinstance(position, dict) else next(iter(position.values()))

    def run() -> torch.Tensor:
        with torch.no_grad():
            out = layer(x, position_embeddings=rope, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out

    before = run()
    found = find_folds(layer, names, run, names)
    assert torch.equal(run(), before)
    assert {fold.before for fold in found} == FOLDS[arch]
    assert {fold.offset for fold in found if "norm" in fold.before} == {1.0 if arch == "gemma2" else 0.0}
    # A Linear that shares the norm and is left out makes the fold wrong, and it is not found.
    fewer = [n for n in names if n != "self_attn.k_proj"]
    assert "input_layernorm" not in {fold.before for fold in find_folds(layer, fewer, run, names)}


def test_a_layer_without_folds_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_layer, "find_folds", lambda *args: [])
    plan = make_plan(loadstone.detect(tiny), parse_recipe("intx4-weight-only:rounding=awq"))
    with pytest.raises(ArtifactError, match="no norm or Linear of LlamaDecoderLayer can take over"):
        calibrate(plan, TOKENS, tmp_path / "out")


def test_inputs_that_are_not_finite_name_the_layer(tiny: Path, tmp_path: Path) -> None:
    model = loadstone.load(tiny)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(1e38)
    model.to(torch.float32).save_pretrained(tmp_path / "m")
    plan = make_plan(loadstone.detect(tmp_path / "m"), parse_recipe("intx4-weight-only:rounding=gptq"))
    with pytest.raises(ArtifactError, match=r"inputs of 'model\.layers\.1\..*NaN or infinite"):
        calibrate(plan, TOKENS, tmp_path / "out")


def test_space_for_the_calibrated_tensors_is_checked_first(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    plan = make_plan(loadstone.detect(tiny), parse_recipe("intx4-weight-only:rounding=gptq"))
    free = plan.bytes_after + (64 << 20) + 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": free}))
    with pytest.raises(MissingError, match="GB free and the output needs"):
        calibrate(plan, TOKENS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("int8-dynamic-act-int4-weight", "gptq"),
        ("intx4-weight-only", "awq"),
        ("int8-dynamic-act-int4-weight", "smoothquant"),
        ("int8-weight-only", "awq"),
        ("int8-dynamic-act-int8-weight", "smoothquant"),
    ],
)
def test_calibrated_artifact_is_like_any_other(
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    algorithm: str,
) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model("llama-tied")
    recipe = with_algorithm(parse_recipe(name), algorithm)
    torch.manual_seed(0)
    rows = torch.randint(3, 250, (8, 64))
    plan = make_plan(loadstone.detect(source), recipe)
    with pytest.raises(UsageError, match="--calibrate"):
        write_plan(plan, tmp_path / "none")
    ready = calibrate(plan, rows, tmp_path / "out")
    assert {bool(s.ready) for s in ready.steps if s.scheme} == {True}
    write_plan(ready, tmp_path / "out")
    assert verify(ready, tmp_path / "out") > 0
    ours = loadstone.load(tmp_path / "out")
    assert torch.equal(logits(ours), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    # Nearer to the source than plain rounding, on the text it was calibrated with; smoothing a random model, which
    # has no large features, gains nothing.
    write_plan(make_plan(loadstone.detect(source), parse_recipe(name)), tmp_path / "plain")
    with torch.inference_mode():
        wanted = loadstone.load(source)(rows).logits.float()
        errors = [
            (loadstone.load(tmp_path / name)(rows).logits.float() - wanted).square().mean()
            for name in ("plain", "out")
        ]
    assert errors[1] < errors[0] * (1.5 if algorithm == "smoothquant" else 1.02)
    # A second run takes the finished layers over, and other tokens do not.
    monkeypatch.setattr(module, "round_layer", lambda *args: pytest.fail("rounded again"))
    folder = calibration_folder(plan, rows, tmp_path / "out", Ranks())
    assert calibrate(plan, rows, tmp_path / "out") == ready == calibrated(plan, folder, Ranks())
    with pytest.raises(pytest.fail.Exception):
        calibrate(plan, rows + 1, tmp_path / "out")


@pytest.mark.parametrize("arch", ["gemma2", "qwen3", "llama-untied"])
def test_layers_run_one_by_one_as_in_the_model(
    make_model: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    source = make_model(arch, "float32")
    recipe = parse_recipe("intx4-weight-only:bits=8,rounding=gptq")
    plan = calibrate(make_plan(loadstone.detect(source), recipe), TOKENS, tmp_path / "out")
    write_plan(plan, tmp_path / "out")
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
    code, _, err = run(capsys, *start, "float8-weight-only", "--overwrite", "--calibrate", text)
    assert code == 2 and "one way of rounding only" in err
    code, _, err = run(capsys, *start, "int8-weight-only", "--overwrite", "--calibrate", text)
    assert code == 2 and "--algorithm gptq is not possible with int8-weight-only. One of affine, awq" in err


def test_algorithm_goes_to_every_recipe_that_has_a_choice(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("default: int8-weight-only\nrules: [{modules: mlp, scheme: intx4-weight-only}]\n")
    mixed = with_algorithm(read_recipe(file), "hqq")
    assert [str(r) for r in mixed.recipes] == ["int8-weight-only", "intx4-weight-only:rounding=hqq"]
    assert str(with_algorithm(parse_recipe("int4-weight-only"), "affine")) == "int4-weight-only"
    with pytest.raises(UsageError, match="--algorithm smoothquant is possible with nothing in"):
        with_algorithm(read_recipe(file), "smoothquant")
    with pytest.raises(UsageError, match="--algorithm gptq is not possible with int4-weight-only"):
        with_algorithm(parse_recipe("int4-weight-only"), "gptq")


GPTQ_EXPERTS = {"recipe": "intx4-weight-only", "algorithm": "gptq", "layout": "compressed-tensors"}


@pytest.mark.parametrize("fewest", [1, 10**6])
def test_experts_are_rounded_on_what_the_router_sends_them(
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fewest: int,
) -> None:
    from loadstone.finalization import calibrate as calibration
    from loadstone.finalization import experts

    monkeypatch.setattr(experts, "FEWEST", fewest)
    source = make_model("qwen3-moe")
    plan = loadstone.plan_finalize(source, calibrate=["unused"], **GPTQ_EXPERTS)
    rows = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    ready = calibration.calibrate(plan, rows, tmp_path / "out")
    write_plan(ready, tmp_path / "out")
    found = loadstone.load(tmp_path / "out", device="cpu", dtype="float32").model.layers[0].mlp.experts
    model = loadstone.load(source, device="cpu", dtype="float32")
    seen: list[tuple[torch.Tensor, ...]] = []
    module = model.model.layers[0].mlp.experts
    module.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        for row in rows:
            model(row[None])
    scheme = plan.steps[-1].scheme or next(step.scheme for step in plan.steps if step.scheme)
    few = 0
    for expert in range(4):
        inputs = torch.cat([x[(chosen == expert).any(-1)] for x, chosen in seen])
        gate, up = module.gate_up_proj[expert].detach().bfloat16().chunk(2)
        moment = inputs.t() @ inputs
        product = torch.nn.functional.silu(inputs @ gate.float().t()) * (inputs @ up.float().t())
        down = module.down_proj[expert].detach().bfloat16()
        wanted = []
        for weight, hessian in ((gate, moment), (up, moment), (down, product.t() @ product)):
            enough = len(inputs) >= fewest
            few += not enough
            tensor = (
                gptq([weight], hessian, scheme)[0]
                if enough
                else quantize_weight(weight, scheme.rounded_by("affine"))
            )
            wanted.append(tensor.dequantize().float())
        assert len(inputs) > 20
        close = {"atol": 0.0, "rtol": 0.0} if fewest > 1 else {"atol": 2e-2, "rtol": 0.05}
        torch.testing.assert_close(found.gate_up_proj[expert].detach(), torch.cat(wanted[:2]), **close)
        torch.testing.assert_close(found.down_proj[expert].detach(), wanted[2], **close)
    reasons = [step.reason for step in ready.steps if ".experts." in step.name]
    assert sum("rounded without text" in reason for reason in reasons) == few * 2
    assert ("fewer than" in caplog.text) == bool(few)


def test_gptq_of_experts_changes_outputs_less(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from loadstone.finalization.calibrate import calibrate as run_calibration

    source = make_model("qwen3-moe")
    rows = torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(1))
    plan = loadstone.plan_finalize(source, calibrate=["unused"], **GPTQ_EXPERTS)
    write_plan(run_calibration(plan, rows, tmp_path / "gptq"), tmp_path / "gptq")
    plain = {**GPTQ_EXPERTS, "algorithm": None}
    loadstone.finalize(source, tmp_path / "plain", **plain)
    errors = []
    with torch.no_grad():
        expected = loadstone.load(source, device="cpu", dtype="float32")(rows).logits
        for name in ("gptq", "plain"):
            found = loadstone.load(tmp_path / name, device="cpu", dtype="float32")(rows).logits
            errors.append(float((found - expected).square().mean()))
    assert errors[0] < 0.9 * errors[1]

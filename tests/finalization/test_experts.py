"""Fused experts: quantized where torchao can multiply them, as torchao itself does, else left and reported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import TOKENS, stock

import loadstone
from loadstone.cli import main
from loadstone.finalization import units
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.finalization.verify import verify
from loadstone.quantization import parse_recipe, read_recipe, to_torchao

from .test_finalize import ON_CPU, snapshot

FLOAT8 = "float8-weight-only"
INT8 = ("int8-weight-only", "int8-dynamic-act-int8-weight")
EXPERTS = [f"model.layers.{n}.mlp.experts.{p}" for n in (0, 1) for p in ("gate_up_proj", "down_proj")]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts under other names (w1, w2, w3), and 12 of them, so that their order as text is not that as numbers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=12, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mixtral") / "model"
    MixtralForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(params=["qwen3-moe", "mixtral", "fused in the file"])
def moe(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], mixtral: Path, tmp_path: Path
) -> Path:
    if request.param == "mixtral":
        return mixtral
    source = make_model("qwen3-moe")
    if request.param == "qwen3-moe":
        return source
    from safetensors.torch import save_file

    path = tmp_path / "fused"
    path.mkdir()
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    state = {k: v.contiguous() for k, v in loadstone.load(source).state_dict().items()}
    assert state[EXPERTS[0]].dim() == 3
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("recipe", [FLOAT8, *INT8])
def test_experts_are_torchaos_own(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    from torchao.quantization import FqnToConfig, quantize_

    plan = make_plan(loadstone.detect(moe), parse_recipe(recipe))
    experts = [s for s in plan.steps if s.scheme and ".experts." in s.name]
    assert experts and not [s.name for s in plan.steps if ".experts." in s.name and not s.scheme]
    write_plan(plan, tmp_path / "out")
    assert verify(plan, tmp_path / "out") > 0
    ours = loadstone.load(tmp_path / "out")
    assert torch.equal(logits(ours), logits(stock(tmp_path / "out")))
    eager = stock(tmp_path / "out", experts_implementation="eager")
    whole = loadstone.load(moe, device="cpu")
    if recipe in INT8:
        # Without a grouped product: config.json says so.
        assert ours.config._experts_implementation == "eager"
        whole.config._experts_implementation = "eager"
    config = to_torchao(parse_recipe(recipe).scheme)
    quantize_(whole.model, config)
    quantize_(whole, FqnToConfig({s.name: config for s in experts}), filter_fn=None)
    assert torch.equal(logits(ours), logits(whole))
    assert torch.equal(logits(eager), logits(stock(tmp_path / "out", experts_implementation="eager")))
    expected = logits(ours)
    with torch.inference_mode():
        assert torch.equal(ours(TOKENS).logits, expected) and len(ours.state_dict()) > len(experts)
    for step in experts:
        a, b = ours.get_parameter(step.name), whole.get_parameter(step.name)
        assert type(a) is type(b) and a.block_size == b.block_size and a.dim() == 3
        assert torch.equal(a.qdata.view(torch.uint8), b.qdata.view(torch.uint8))
        assert torch.equal(a.scale, b.scale)
    # Blocks of rows, and blocks that end inside an expert, make no difference.
    monkeypatch.setattr(units, "BLOCK", 1000)
    write_plan(plan, tmp_path / "blocks")
    assert snapshot(tmp_path / "blocks") == snapshot(tmp_path / "out")


@pytest.mark.parametrize("recipe", [r for r in ON_CPU if r not in (FLOAT8, *INT8)])
def test_what_torchao_cannot_multiply_is_left_with_its_reason(
    make_model: Callable[..., Path], recipe: str
) -> None:
    from torchao.quantization import FqnToConfig, quantize_

    source = make_model("qwen3-moe")
    plan = make_plan(loadstone.detect(source), parse_recipe(recipe))
    left = [s for s in plan.steps if ".experts." in s.name]
    assert {s.action for s in left} == {"copy"}
    (reason,) = {s.reason for s in left}
    assert reason.startswith("fused experts: torchao")
    # The reason is true: torchao cannot quantize them, or the quantized model does not run as transformers runs it.
    model = loadstone.load(source)
    with pytest.raises((NotImplementedError, ValueError, RuntimeError, AttributeError, AssertionError)):
        config = to_torchao(parse_recipe(recipe).scheme)
        quantize_(model, FqnToConfig(dict.fromkeys(EXPERTS, config)), filter_fn=None)
        logits(model)


@pytest.mark.parametrize("recipe", [FLOAT8, *INT8])
def test_one_scale_for_all_experts_is_left(make_model: Callable[..., Path], recipe: str) -> None:
    plan = make_plan(loadstone.detect(make_model("qwen3-moe")), parse_recipe(f"{recipe}:granularity=tensor"))
    assert {s.reason for s in plan.steps if ".experts." in s.name} == {
        "fused experts: one scale for the whole tensor would need all of them at once"
    }


def test_rules_name_experts(make_model: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "default: intx4-weight-only\nrules:\n"
        "  - {modules: layers.1.mlp.experts.down_proj, scheme: skip}\n"
        f"  - {{modules: experts, scheme: {FLOAT8}}}\n"
    )
    plan = make_plan(loadstone.detect(make_model("qwen3-moe")), read_recipe(file))
    assert {s.name for s in plan.steps if s.scheme and ".experts." in s.name} == set(EXPERTS) - {EXPERTS[3]}
    assert {s.reason for s in plan.steps if ".1.mlp.experts." in s.name and "down" in s.name} == {
        "skipped as asked"
    }
    write_plan(plan, tmp_path / "out")
    ours, theirs = loadstone.load(tmp_path / "out"), stock(tmp_path / "out")
    assert torch.equal(logits(ours), logits(theirs))
    assert type(ours.get_parameter(EXPERTS[0])).__name__ == "Float8Tensor"
    assert type(ours.get_parameter(EXPERTS[3])).__name__ == "Parameter"


@pytest.mark.parametrize("recipe", [FLOAT8, *INT8])
def test_the_command_reports_and_evaluates(
    make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    def run(*args: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert not stop.value.code, err
        return out

    source = make_model("qwen3-moe")
    start = ["finalize", "-M", source, "-o", tmp_path / "out", "--quantize"]
    out = json.loads(run(*start, "intx4-weight-only", "--dry-run", "--json"))
    assert out["experts_left"]["tensors"] == 24
    out = json.loads(run(*start, recipe, "--json"))
    assert out["experts_left"]["tensors"] == 0
    modules = {m["module"]: m["recipe"] for m in out["modules"]}
    assert {modules[name] for name in EXPERTS} == {recipe}
    text = tmp_path / "t.txt"
    text.write_text("Once upon a time there was a stone that knew the way. " * 20)
    run("eval", "-M", tmp_path / "out", "--data", text, "--separator", 1, "--json", tmp_path / "found.json")
    assert "loss" in (tmp_path / "found.json").read_text()


@pytest.mark.parametrize("recipe", ["intx4-weight-only", "float8-dynamic-act-float8-weight"])
def test_experts_that_are_stored_under_another_name(recipe: str, tmp_path: Path) -> None:
    """Granite's `input_linear` of all experts is `experts.gate_up_proj` of the model."""
    import transformers

    config = transformers.GraniteMoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(5)
    model = transformers.GraniteMoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    out = loadstone.finalize(
        tmp_path / "model", tmp_path / "out", recipe=recipe, layout="compressed-tensors", verify=True
    ).out
    loaded = loadstone.load(out).model.layers[0].block_sparse_moe.experts
    for name, weight in model.model.layers[0].block_sparse_moe.experts.named_parameters():
        found = loaded.get_parameter(name)
        assert 0 < (found - weight).abs().max() < weight.abs().max() / 4, name

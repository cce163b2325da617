"""QAT checkpoints: what was trained is what is converted, bit for bit, by the recipe that the checkpoint records."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import TOKENS, logits, run

import loadstone
from loadstone.artifact.detect import QAT, QAT_KEY
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization import plan_finalize
from loadstone.quantization import RECIPES, parse_recipe
from loadstone.quantization.qat import prepare, record

TRAINABLE = [
    "int8-dynamic-act-int4-weight",
    "int8-dynamic-act-int4-weight:group_size=0",
    "int8-dynamic-act-intx-weight",
    "intx4-weight-only",
    "intx3-weight-only",
    "intx2-weight-only",
]


def trained(source: Path, out: Path, recipe: str) -> torch.nn.Module:
    """A few steps of real training under fake quantization, saved with its record."""
    model = prepare(loadstone.load(source), recipe).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    record(model.config, recipe)
    model.save_pretrained(out)
    return model.eval()


@pytest.mark.parametrize("recipe", TRAINABLE)
def test_prepared_and_converted_logits_are_equal_in_bf16(tiny: Path, tmp_path: Path, recipe: str) -> None:
    prepared = trained(tiny, tmp_path / "qat", recipe)
    artifact = loadstone.detect(tmp_path / "qat")
    assert artifact.kind == QAT and artifact.config[QAT_KEY] == {"recipe": recipe}
    assert not torch.equal(logits(prepared), logits(loadstone.load(tiny)))
    loadstone.finalize(artifact, tmp_path / "out")
    assert QAT_KEY not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "loadstone.json").read_text())["recipe"] == recipe
    assert torch.equal(logits(prepared), logits(loadstone.load(tmp_path / "out")))


def test_gradients_pass_and_the_head_stays_plain(tiny: Path) -> None:
    model = prepare(loadstone.load(tiny), "intx4-weight-only")
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "FakeQuantizedLinear"


@pytest.mark.parametrize(
    "name", [name for name, recipe in RECIPES.items() if not recipe.scheme.trains_exactly]
)
def test_recipes_without_exact_fake_quantization_are_refused(tiny: Path, name: str) -> None:
    with pytest.raises(UsageError, match="intx4-weight-only"):
        prepare(loadstone.load(tiny), name)
    with pytest.raises(UsageError, match="no fake quantization"):
        record(tiny, parse_recipe(name))


def test_a_record_follows_no_link(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "other").write_text("not ours")
    (tmp_path / ".config.json.partial").symlink_to(tmp_path / "other")
    with pytest.raises(UsageError, match=r"\.config\.json\.partial' is in the way"):
        record(tmp_path, TRAINABLE[0])
    assert (tmp_path / "other").read_text() == "not ours"


def test_another_recipe_is_refused_naming_both(
    make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "qat"
    loadstone.load(make_model("llama-untied")).save_pretrained(source)
    record(source, "intx4-weight-only:group_size=64")
    artifact = loadstone.detect(source)
    same = parse_recipe("intx4-weight-only:group_size=64")
    assert plan_finalize(artifact, recipe=same).recipe == plan_finalize(artifact).recipe == same
    with pytest.raises(UsageError, match=r"'intx4-weight-only:group_size=64', and 'int8-weight-only'"):
        plan_finalize(artifact, recipe="int8-weight-only")
    code, _, err = run(
        capsys, "finalize", "-M", source, "--quantize", "intx4-weight-only", "-o", tmp_path / "o"
    )
    assert code == 2 and "trained for" in err
    code, out, _ = run(capsys, "finalize", "-M", source, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["recipe"] == str(same)


@pytest.mark.parametrize("entry", [{}, {"recipe": 4}, {"recipe": "nf4"}, {"recipe": "int8-weight-only"}])
def test_a_record_that_cannot_be_used_is_named(tiny: Path, tmp_path: Path, entry: dict[str, object]) -> None:
    loadstone.load(tiny).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {QAT_KEY: entry}))
    with pytest.raises(ArtifactError, match="loadstone_qat cannot be used"):
        plan_finalize(tmp_path)


def test_record_needs_a_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config.json"):
        record(tmp_path, "intx4-weight-only")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_damaged_takes_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json: not a valid JSON object"):
        record(tmp_path, "int8-dynamic-act-int4-weight")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]

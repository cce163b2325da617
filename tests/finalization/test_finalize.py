"""Finalize: the same tensors as torchao on the whole model, written whole or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.helpers import logits

import loadstone
from loadstone.artifact.hashing import sha256_file
from loadstone.artifact.manifest import verify_files
from loadstone.errors import ArtifactError, MissingError, UsageError
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.quantization import RECIPES, parse_recipe, to_torchao

from .headers import write_headers

ON_CPU = [name for name, recipe in RECIPES.items() if "cpu" in recipe.devices]
W4 = "int8-dynamic-act-int4-weight"


def plan_of(source: Path, recipe: str | None = W4, **options: object):
    return make_plan(loadstone.detect(source), parse_recipe(recipe) if recipe else None, **options)


def snapshot(directory: Path) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): sha256_file(p) for p in sorted(directory.rglob("*")) if p.is_file()
    }


def weights(directory: Path) -> dict[str, str]:
    return {k: v for k, v in snapshot(directory).items() if k != "loadstone.json"}


@pytest.mark.parametrize("recipe", ON_CPU)
def test_same_tensors_as_quantize_on_the_whole_model(
    tiny: Path, quantize_to: Callable[..., Path], recipe: str
) -> None:
    from torchao.quantization import quantize_

    whole = loadstone.load(tiny)
    quantize_(whole.model, to_torchao(RECIPES[recipe].scheme))
    ours = loadstone.load(quantize_to(tiny, recipe))
    assert torch.equal(logits(ours), logits(whole))
    for (name, a), b in zip(ours.named_parameters(), whole.parameters(), strict=True):
        for part in getattr(a, "tensor_data_names", ()):
            assert torch.equal(getattr(a, part).view(torch.uint8), getattr(b, part).view(torch.uint8)), (
                name,
                part,
            )


def test_writes_what_save_pretrained_writes(
    tiny: Path, quantize_to: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    stock = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=TorchAoConfig(to_torchao(RECIPES[W4].scheme)), device_map="cpu"
    )
    stock.save_pretrained(tmp_path)
    ours = quantize_to(tiny, W4)
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as a,
        safe_open(ours / "model.safetensors", "pt") as b,
    ):
        assert set(a.keys()) == set(b.keys())
        theirs, mine = a.metadata(), b.metadata()
        # transformers also describes the tied head, which it does not store.
        assert json.loads(theirs.pop("lm_head.weight")) == {"_type": "Tensor"}
        assert set(json.loads(theirs.pop("tensor_names"))) - {"lm_head.weight"} == set(
            json.loads(mine.pop("tensor_names"))
        )
        assert theirs == mine
        for key in a.keys():  # noqa: SIM118
            assert torch.equal(a.get_tensor(key), b.get_tensor(key)), key
    stock_block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert json.loads((ours / "config.json").read_text())["quantization_config"] == stock_block


@pytest.mark.parametrize("recipe", [None, W4])
def test_shards_hold_the_same_tensors(tiny: Path, tmp_path: Path, recipe: str | None) -> None:
    write_plan(plan_of(tiny, recipe), tmp_path / "one")
    write_plan(plan_of(tiny, recipe, max_shard_bytes=30_000), tmp_path / "many")
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    table = loadstone.detect(tmp_path / "many").source.table
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in table.tensors.values())
    one, many = loadstone.load(tmp_path / "one"), loadstone.load(tmp_path / "many")
    assert torch.equal(logits(one), logits(many))
    from transformers import AutoModelForCausalLM

    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "many")), logits(one))


def test_the_same_bytes_every_time(tiny: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_plan(plan_of(tiny), tmp_path / name)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_source_is_untouched_and_sidecars_come_along(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    (source / "optimizer.pt").write_bytes(b"x")
    (source / "preprocessor_config.json").write_text("{}")
    (source / "README.md").write_text("# card")
    before = snapshot(source)
    out = tmp_path / "out"
    write_plan(plan_of(source), out)
    assert snapshot(source) == before
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "README.md"} <= set(
        {p.name for p in out.iterdir()}
    )
    assert not (out / "optimizer.pt").exists()
    assert verify_files(out) == []
    (out / "README.md").write_text("changed")
    assert verify_files(out) == ["README.md: content differs from the sha256 in loadstone.json"]


def test_one_chat_template(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "inline"}))
    (source / "chat_template.jinja").write_text("file")
    write_plan(plan_of(source, None), tmp_path / "out")
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert loadstone.loading.load_tokenizer(tmp_path / "out").chat_template == "file"


def test_plain_finalize_of_a_bin(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "bin"
    shutil.copytree(tiny, source, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(loadstone.load(tiny).state_dict(), source / "pytorch_model.bin")
    write_plan(plan_of(source, None), tmp_path / "out")
    assert loadstone.detect(tmp_path / "out").weights.format == "safetensors"
    assert torch.equal(logits(loadstone.load(tmp_path / "out")), logits(loadstone.load(tiny)))


def test_dtype_casts_floats(tiny: Path, tmp_path: Path) -> None:
    write_plan(plan_of(tiny, None, dtype="float32"), tmp_path / "out")
    model = loadstone.load(tmp_path / "out")
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(loadstone.load(tiny, dtype="float32")))


def test_gpt2_has_no_linear_that_could_be_quantized(make_model: Callable[..., Path]) -> None:
    with pytest.raises(
        ArtifactError, match=r"GPT2LMHeadModel has no weight(?s:.)*Conv1D(?s:.)*export-fakequant"
    ):
        plan_of(make_model("gpt2"))


@pytest.mark.parametrize("recipe", [None, *ON_CPU])
@pytest.mark.parametrize("arch", ["llama-tied", "qwen3-moe"])
def test_the_size_is_known_before(
    make_model: Callable[..., Path], tmp_path: Path, arch: str, recipe: str | None
) -> None:
    plan = plan_of(make_model(arch), recipe)
    write_plan(plan, tmp_path / "out")
    table = loadstone.detect(tmp_path / "out").source.table
    assert plan.bytes_after == sum(t.nbytes for t in table.tensors.values())
    assert plan.bytes_before == sum(t.nbytes for t in loadstone.detect(make_model(arch)).tensors.values())


def test_a_671b_model_is_planned_from_headers(tmp_path: Path) -> None:
    count = write_headers(tmp_path / "headers")
    plan = plan_of(tmp_path / "headers", W4)
    assert len(plan.steps) == count == 45_395
    assert sum(s.reason == "fused experts: torchao's intx tensors are 2-D" for s in plan.steps) == 44_544
    # In float8 a scale of 4 bytes for each row of 3 x 2048 x 7168 values, for 256 experts in each of 58 layers.
    plan = plan_of(tmp_path / "headers", "float8-weight-only")
    fused = [s for s in plan.steps if s.reason == "fused experts"]
    assert len(fused) == 2 * 58
    assert sum(s.nbytes for s in fused) == 58 * 256 * (3 * 2048 * 7168 + 4 * (2 * 2048 + 7168))


def test_a_671b_model_in_fp8_is_planned_from_headers(tmp_path: Path) -> None:
    """As published but for 57 layers, with one for multi-token prediction, which transformers does not load."""
    count = write_headers(tmp_path / "headers", fp8=True, layers=4)
    packed = loadstone.detect(tmp_path / "headers").packed
    plan = loadstone.plan_finalize(
        tmp_path / "headers", recipe="intx4-weight-only:group_size=128", layout="compressed-tensors"
    )
    assert len(plan.steps) == count - len(packed)
    experts = [step for step in plan.steps if ".experts." in step.name and step.scheme]
    assert {step.reason for step in experts} == {"fused experts, from FP8 block 128"} and len(experts) == 768
    quantized = sum(
        step.nbytes for step in plan.steps if step.name == "model.layers.3.mlp.experts.7.up_proj.weight"
    )
    assert quantized == 2048 * 7168 // 2 + 2 * 2048 * 7168 // 128 + 16
    mtp = [step.action for step in plan.steps if step.name.startswith("model.layers.61.")]
    assert mtp.count("decode") == 3 * 257 + 5 and set(mtp) == {"decode", "copy"}
    assert plan.bytes_before == sum(
        info.nbytes for info in loadstone.detect(tmp_path / "headers").tensors.values()
    )


def test_skip_and_misfits_are_named_in_the_block(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny, W4, skip=["down_proj"])
    assert {s.reason for s in plan.steps if "down_proj" in s.name} == {"skipped as asked"}
    names = plan.config["quantization_config"]["modules_to_not_convert"]
    assert {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} == set(names)
    write_plan(plan, tmp_path / "out")
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock), logits(loadstone.load(tmp_path / "out")))
    assert {s.name for s in plan_of(tiny, skip=["re:.*layers.1.*"]).steps if s.reason.startswith("skip")} == {
        s.name for s in plan.steps if "layers.1" in s.name and "proj" in s.name
    }
    with pytest.raises(UsageError, match="matches no Linear"):
        plan_of(tiny, skip=["up"])
    wide = plan_of(tiny, "intx4-weight-only:group_size=128")
    assert any("not a multiple of the group size 128" in step.reason for step in wide.steps)


def test_refusals(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="--overwrite"):
        write_plan(plan_of(tiny), tmp_path / "there")
    for inside in (tiny, tiny / "out", tiny.parent):
        with pytest.raises(UsageError, match="overlap"):
            write_plan(plan_of(tiny), inside, overwrite=True)


def test_overwrite_replaces_whole(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("old")
    write_plan(plan_of(tiny), out, overwrite=True)
    assert not (out / "stale.safetensors").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_too_little_disk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MissingError, match="GB free and the output needs"):
        write_plan(plan_of(tiny), tmp_path / "out")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_failure_leaves_no_output(tiny: Path, tmp_path: Path, stop: type[BaseException]) -> None:
    out = tmp_path / "out"
    write_plan(plan_of(tiny, None), out)
    before = snapshot(out)

    def fail(count: int) -> None:
        raise stop

    with pytest.raises(stop):
        write_plan(plan_of(tiny), out, overwrite=True, on_progress=fail)
    assert snapshot(out) == before


def test_nan_in_a_weight_is_refused(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    info = loadstone.detect(source).tensors["model.layers.0.mlp.up_proj.weight"]
    raw = bytearray((source / info.file).read_bytes())
    raw[info.begin : info.begin + 2] = b"\xc0\x7f"
    (source / info.file).write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"layers.0.mlp.up_proj.weight' holds NaN"):
        write_plan(plan_of(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()

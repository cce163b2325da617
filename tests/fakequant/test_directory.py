"""Exports from a directory: what is folded, what lies beside it, what is refused, and that nothing is half written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fakequant.conftest import hashes, load, logits, manifest, tensors
from tests.helpers import on_ranks

import loadstone
from loadstone import export_fakequant
from loadstone.artifact import TensorInfo
from loadstone.artifact.hashing import sha256_file
from loadstone.artifact.manifest import verify_files
from loadstone.errors import ArtifactError, MissingError, UsageError
from loadstone.fakequant.encoder import FakeQuantEncoding
from loadstone.fakequant.formats import FORMATS, parse_format
from loadstone.fakequant.formats.fold import fold
from loadstone.finalization import run, units
from loadstone.finalization.plan import Step
from loadstone.quantization import RECIPES


def rules_file(folder: Path, text: str) -> Path:
    path = folder / "rules.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", [*FORMATS, "fp8:granularity=row", "intx4-weight-only"])
def test_each_format_is_folded_and_the_rest_is_as_it_was(text: str, tiny: Path, tmp_path: Path) -> None:
    done = export_fakequant(tiny, tmp_path / "out", format=text)
    stored, found = tensors(tiny), tensors(tmp_path / "out")
    assert found.keys() == stored.keys()
    spec = parse_format(text).weight
    for name, tensor in stored.items():
        folded = "proj" in name
        assert torch.equal(found[name], fold(name, tensor, spec) if folded else tensor), name
        assert folded == (name in manifest(tmp_path / "out")["tensors"])
    assert len(done.plan.folded) == 14


def test_experts_are_folded_along_their_inputs(experts_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Llama 4's and gpt-oss' are stored (in, out); only gpt-oss' module says so itself."""
    spec = parse_format("mxfp8").weight
    for family in ("llama4", "gpt-oss", "qwen3-moe"):
        source = experts_model(family)
        export_fakequant(source, tmp_path / family, format="mxfp8")
        before, after = loadstone.load(source).state_dict(), loadstone.load(tmp_path / family).state_dict()
        for name in [n for n, p in before.items() if p.dim() == 3 and "experts" in n]:
            turned = family != "qwen3-moe"
            laid = before[name].mT.contiguous() if turned else before[name]
            folded = fold(name, laid, spec)
            assert torch.equal(after[name], folded.mT if turned else folded), name


def test_export_loads_in_transformers_and_loadstone(tiny: Path, tmp_path: Path) -> None:
    export_fakequant(tiny, tmp_path / "out", format="nvfp4")
    artifact = loadstone.detect(tmp_path / "out")
    assert artifact.kind == "fakequant" and artifact.notes == ()
    stock = load(tmp_path / "out")
    assert torch.equal(logits(loadstone.load(tmp_path / "out")), logits(stock))
    assert not torch.equal(logits(stock), logits(load(tiny)))


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma2", "qwen3-moe"])
def test_architectures(arch: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model(arch)
    done = export_fakequant(source, tmp_path / "out", format="fp8")
    assert len(done.plan.folded) == (44 - 12 if arch == "qwen3-moe" else 14)
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


@pytest.mark.parametrize("text", [*FORMATS, "intx4-weight-only"])
def test_conv1d_is_folded_along_its_inputs(
    text: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model("gpt2")
    done = export_fakequant(source, tmp_path / "out", format=text)
    before, after = load(source).state_dict(), load(tmp_path / "out").state_dict()
    folded = [step.name for step in done.plan.folded]
    assert len(folded) == 8 and all(
        name.rpartition(".")[0].endswith(("c_attn", "c_proj", "c_fc")) for name in folded
    )
    spec = parse_format(text).weight
    for name, weight in before.items():
        if name not in folded:
            assert torch.equal(after[name], weight)
            continue
        expected = fold(name, weight.t().contiguous(), spec).t()
        assert torch.equal(after[name], expected) and not torch.equal(expected, weight)


def test_inputs_of_conv1d(make_model: Callable[..., Path], tmp_path: Path) -> None:
    ids = [torch.arange(3, 35)[None]]
    done = export_fakequant(make_model("gpt2"), tmp_path / "out", format="fp8", calibrate=ids)
    assert len(done.quantizers) == 8 and loadstone.detect(tmp_path / "out").kind == "fakequant"


def test_text_beyond_the_vocabulary(make_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"token 40000(?s:.)*no such token"):
        export_fakequant(
            make_model("gpt2"), tmp_path / "out", format="fp8", calibrate=[torch.tensor([[40000]])]
        )
    assert not (tmp_path / "out").exists()


def test_shards_stay_as_they_are_and_total_size_is_true(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model("llama-tied", max_shard_size="60KB")
    export_fakequant(source, tmp_path / "out", format="int8")
    theirs = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == theirs and len(set(theirs.values())) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    for name, file in theirs.items():
        assert name in load_file(tmp_path / "out" / file)


def test_bin_sources(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "bin"
    shutil.copytree(tiny, source, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load(tiny).state_dict(), source / "pytorch_model.bin")
    export_fakequant(source, tmp_path / "out", format="fp8")
    export_fakequant(tiny, tmp_path / "other", format="fp8")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "other")
    assert manifest(tmp_path / "out")["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_distributed_checkpoints(tiny: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    run = tmp_path / "run"
    shutil.copytree(tiny, run, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {k: v for k, v in load(tiny).state_dict().items() if k != "lm_head.weight"}
    dcp.save({"model": state}, checkpoint_id=run / "checkpoint-3" / "pytorch_model_fsdp_0", no_dist=True)
    export_fakequant(run, tmp_path / "out", format="nvfp4")
    export_fakequant(tiny, tmp_path / "other", format="nvfp4")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "other")


def test_two_exports_to_one_output(tiny: Path, tmp_path: Path) -> None:
    from loadstone.writing.publish import locked

    out = tmp_path / "deep" / "out"
    with locked(out), pytest.raises(UsageError, match="another process is writing"):
        export_fakequant(tiny, out, format="fp8")
    assert not out.parent.exists()
    export_fakequant(tiny, out, format="fp8")
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile_is_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def other_wrote(*args: object) -> None:
        out.mkdir()
        (out / "theirs").touch()

    monkeypatch.setattr("loadstone.finalization.run.check_space", other_wrote)
    with pytest.raises(UsageError, match="appeared while it was made"):
        export_fakequant(tiny, out, format="fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "theirs").exists()


def test_sidecars_byte_for_byte_and_the_source_untouched(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    extra = {
        "preprocessor_config.json": '{"a": 1,\n "b": 2}',
        "processor_config.json": "{}",
        "generation_config.json": '{"max_length":  7}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in extra.items():
        (source / name).write_text(text)
    (source / "optimizer.pt").write_bytes(b"x")
    before = {p.name: sha256_file(p) for p in source.iterdir()}
    export_fakequant(source, tmp_path / "out", format="fp8")
    assert {p.name: sha256_file(p) for p in source.iterdir()} == before
    for name in (*extra, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    for name in (*extra, "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    export_fakequant(source, tmp_path / "bare", format="fp8")
    assert verify_files(tmp_path / "bare") == []


def remote(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    found = json.loads((target / "config.json").read_text())
    reference = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    found |= {
        "auto_map": reference,
        "nested": {"deep": [{"auto_map": {"AutoModel": "modeling_x.Y"}, "kept": 1}]},
    } | config
    (target / "config.json").write_text(json.dumps(found))
    return target


def test_auto_map_goes_at_any_depth(tiny: Path, tmp_path: Path) -> None:
    source = remote(tiny, tmp_path / "source")
    (source / "modeling_x.py").write_text("raise SystemExit('never run')")
    export_fakequant(source, tmp_path / "out", format="fp8")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "auto_map" not in text and json.loads(text)["nested"] == {"deep": [{"kept": 1}]}
    assert not list((tmp_path / "out").glob("*.py"))
    from transformers import AutoConfig

    AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    load(tmp_path / "out")


def test_remote_code_is_copied_whole_or_not_at_all(tiny: Path, tmp_path: Path) -> None:
    source = remote(tiny, tmp_path / "source")
    (source / "modeling_x.py").write_text("from .configuration_x import XConfig\nfrom .helper_x import f\n")
    (source / "configuration_x.py").write_text("")
    with pytest.raises(ArtifactError, match=r"auto_map needs helper_x\.py"):
        export_fakequant(source, tmp_path / "out", format="fp8", remote_code="copy")
    assert not (tmp_path / "out").exists()
    (source / "helper_x.py").write_text("f = 1")
    (source / "unrelated.py").write_text("")
    export_fakequant(source, tmp_path / "out", format="fp8", remote_code="copy")
    copied = {p.name for p in (tmp_path / "out").glob("*.py")}
    assert (
        copied
        == {"modeling_x.py", "configuration_x.py", "helper_x.py"}
        <= set(manifest(tmp_path / "out")["files"])
    )
    assert "auto_map" in (tmp_path / "out" / "config.json").read_text()


def test_a_model_class_that_transformers_lacks_is_told_by_names(tiny: Path, tmp_path: Path) -> None:
    source = remote(tiny, tmp_path / "source", model_type="x-unknown")
    done = export_fakequant(source, tmp_path / "out", format="fp8")
    export_fakequant(tiny, tmp_path / "known", format="fp8")
    assert len(done.plan.folded) == 14
    ours, known = tensors(tmp_path / "out"), tensors(tmp_path / "known")
    assert all(torch.equal(ours[n], known[n]) for n in known)


def test_rules(tiny: Path, tmp_path: Path) -> None:
    text = """
format: fp8
rules:
  - match: "*.down_proj"
    format: nvfp4
  - match: layers.0
    format: none
  - match: model.embed_tokens
    format: int8
  - {match: lm_head, format: int8}
"""
    done = export_fakequant(tiny, tmp_path / "out", rules=rules_file(tmp_path, text))
    facts = manifest(tmp_path / "out")["tensors"]
    assert facts["model.layers.0.mlp.down_proj.weight"]["format"] == "nvfp4"
    assert facts["model.layers.1.mlp.up_proj.weight"] == {
        "format": "fp8",
        "rule": "default",
        "amax": "weight",
    }
    assert facts["model.embed_tokens.weight"]["rule"] == "model.embed_tokens: int8"
    assert (
        manifest(tmp_path / "out")["not_folded"]["model.layers.0.mlp.up_proj.weight"] == "left out by a rule"
    )
    assert len(done.plan.folded) == 2 + 6 + 1
    over = export_fakequant(tiny, tmp_path / "over", rules=tmp_path / "rules.yaml", format="mxfp8")
    assert str(over.plan.rules.default) == "mxfp8"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "format: fp8\nrules:\n  - {match: nothing_here, format: int8}",
            r"rules.yaml:3: the rule 'nothing_here: int8'",
        ),
        (
            "format: fp8\nrules: [{match: mlp, format: none}, {match: up_proj, format: int8}]",
            "earlier rules match all",
        ),
        ("format: fp9", "Did you mean 'fp8'"),
        ("format: fp8\nrules:\n  - {match: mlp}", "rules.yaml:3: the rule has no format"),
        ("rules: [{match: mlp, format: none}]", "no format is named"),
        ("- fp8", "rules.yaml:1: a rules file is a mapping"),
        ("", "no format is named"),
        ("format: [", "rules.yaml:1: expected the node content"),
        ("format: !!python/object/apply:os.system [true]", "rules.yaml:1: a format is text"),
        ("format: fp8\nrules:\n  - {match: 're:(', format: none}", "rules.yaml:3: 're:\\(' is not a regular"),
        ("format: fp8\nrules: []\nrules: []", "rules.yaml:3: 'rules' is duplicated"),
        ("format: fp8\n<<: {rules: []}", "rules.yaml:2: unknown key '<<'"),
        ("[" * 3000, "rules.yaml: not valid YAML"),
    ],
)
def test_rules_that_are_wrong(text: str, says: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        export_fakequant(tiny, tmp_path / "out", rules=rules_file(tmp_path, text))
    assert not (tmp_path / "out").exists()


def damaged(tiny: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(tiny, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, tiny: Path, tmp_path: Path) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"][3, 3] = value

    source = damaged(tiny, tmp_path / "source", spoil)
    with pytest.raises(
        ArtifactError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinity"
    ):
        export_fakequant(source, tmp_path / "out", format="fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_tied_sides_that_differ(tiny: Path, tmp_path: Path) -> None:
    def add(shift: float) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda state: state.update(
            {"lm_head.weight": state["model.embed_tokens.weight"].clone() + shift}
        )

    with pytest.raises(ArtifactError, match=r"'lm_head\.weight' and 'model\.embed_tokens\.weight' are tied"):
        export_fakequant(damaged(tiny, tmp_path / "source", add(1)), tmp_path / "out", format="fp8")
    assert not (tmp_path / "out").exists()
    export_fakequant(damaged(tiny, tmp_path / "same", add(0)), tmp_path / "out", format="fp8")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    assert manifest(tmp_path / "out")["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_width_that_a_rule_asks_for_and_cannot_have(tiny: Path, tmp_path: Path) -> None:
    def narrow(state: dict[str, torch.Tensor]) -> None:
        for layer in "01":
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            state[name] = state[name][:, :120].clone()
            for part in ("gate", "up"):
                name = f"model.layers.{layer}.mlp.{part}_proj.weight"
                state[name] = state[name][:120].clone()

    source = damaged(tiny, tmp_path / "source", narrow)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 120}))
    done = export_fakequant(source, tmp_path / "left", format="mxfp4")
    reason = manifest(tmp_path / "left")["not_folded"]["model.layers.0.mlp.down_proj.weight"]
    assert "its width 120 is no multiple of 32" in reason and len(done.plan.folded) == 12
    path = rules_file(tmp_path, "rules: [{match: down_proj, format: mxfp4}]")
    with pytest.raises(
        ArtifactError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' cannot be folded: its width 120"
    ):
        export_fakequant(source, tmp_path / "out", rules=path)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_quantized(tiny: Path, tmp_path: Path) -> None:
    export_fakequant(tiny, tmp_path / "once", format="fp8")
    with pytest.raises(ArtifactError, match="is a fake-quantized export"):
        export_fakequant(tmp_path / "once", tmp_path / "out", format="fp8")

    def to_float8(state: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        state[name] = state[name].to(torch.float8_e4m3fn)

    with pytest.raises(ArtifactError, match=r"layers\.0\.mlp\.up_proj\.weight' \(F8_E4M3\) was written by"):
        export_fakequant(damaged(tiny, tmp_path / "source", to_float8), tmp_path / "out", format="fp8")


def test_outputs_that_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("old")
    with pytest.raises(UsageError, match="exists"):
        export_fakequant(tiny, out, format="fp8")
    with pytest.raises(UsageError, match="overlap"):
        export_fakequant(tiny, tiny / "inside", format="fp8")
    export_fakequant(tiny, out, format="fp8", overwrite=True)
    assert not (out / "stale.safetensors").exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("loadstone.writing.publish.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MissingError, match="GB free and the output needs"):
        export_fakequant(tiny, tmp_path / "full", format="fp8")
    assert not (tmp_path / "full").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("recipe", [n for n, r in RECIPES.items() if "cpu" not in r.devices])
def test_recipes_that_need_a_gpu_name_the_first_tensor(recipe: str, tiny: Path, tmp_path: Path) -> None:
    says = rf"'model\.layers\.0\.mlp\.down_proj\.weight' cannot be folded by {recipe}.* on cpu \(.*\)\. Use "
    with pytest.raises(MissingError, match=says):
        export_fakequant(tiny, tmp_path / "out", format=recipe)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_that_is_not_there_names_the_first_tensor(tiny: Path, tmp_path: Path) -> None:
    says = r"no CUDA device is visible; tensor 'model\.layers\.0\.mlp\.down_proj\.weight' .* Use --device cpu"
    for source in (tiny, load(tiny)):
        with pytest.raises(MissingError, match=says):
            export_fakequant(source, tmp_path / "out", format="fp8", device="cuda")
    assert not (tmp_path / "out").exists()


def test_output_that_is_not_as_planned(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.fakequant import export
    from loadstone.fakequant.live import LiveTensors

    model = load(tiny)
    real = LiveTensors.read

    def fewer(self: Any) -> Any:
        return ((k, t) for k, t in real(self) if "norm" not in k)

    def twice(self: Any) -> Any:
        for key, tensor in real(self):
            yield key, tensor
            yield key, tensor

    def other(self: Any) -> Any:
        return ((k, t.float()) for k, t in real(self))

    def stranger(self: Any) -> Any:
        yield "model.stranger", torch.ones(2)

    cases = {
        fewer: "5 tensors never came: model.layers.0.input_layernorm",
        twice: "came twice",
        other: "announced as",
    }
    for wrong, says in (cases | {stranger: "'model.stranger' came and is not in the plan"}).items():
        monkeypatch.setattr(LiveTensors, "read", wrong)
        with pytest.raises(ArtifactError, match=says):
            export_fakequant(model, tmp_path / "out", format="fp8")
    monkeypatch.setattr(LiveTensors, "read", real)
    for room in (export, run):
        monkeypatch.setattr(room, "write_index", lambda work, *args: (work / "x").touch())
    for source in (model, tiny):
        with pytest.raises(ArtifactError):
            export_fakequant(source, tmp_path / "out", format="fp8")
        assert not any(tmp_path.iterdir())


# Of weights: (out, in), (experts, out, in), and stored as (experts, in, out).
SHAPES = [((200, 96), False), ((3, 200, 96), False), ((3, 96, 200), True)]


@pytest.mark.parametrize("shape, transposed", SHAPES)
@pytest.mark.parametrize(
    "text",
    [*FORMATS, "fp8:granularity=row", "fp8:granularity=block,block=24", "int4:block=40", "intx4-weight-only"],
)
def test_blocks_of_rows_give_the_bits_of_whole_weights(
    text: str, shape: tuple[int, ...], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "BLOCK", 4 * 96 * 50)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[..., -1, -1] = 9.0
    info = TensorInfo("w", "BF16", shape, "", 0, weight.nbytes)
    encoding = FakeQuantEncoding(info, parse_format(text), transposed)
    step = Step((info,), "w", (info,), encoding)
    raw = torch.zeros(weight.nbytes, dtype=torch.uint8)
    parts = list(units.step_units(step, 0, "cpu"))
    for unit in parts:
        for _, part, offset in units.encode_unit(unit, weight.reshape(-1)[unit.start : unit.stop], "cpu"):
            raw[offset : offset + part.nbytes] = part.contiguous().reshape(-1).view(torch.uint8)
    laid = weight.mT.contiguous() if transposed else weight
    expected = fold("w", laid, parse_format(text).weight)
    found = raw.view(torch.bfloat16).reshape(shape)
    assert torch.equal(
        (found.mT if transposed else found).contiguous().view(torch.int16), expected.view(torch.int16)
    )
    # Rows that nothing ties together are not read together.
    if not transposed and text in ("int8", "int4", "mxfp8", "mxfp4", "fp8:granularity=row"):
        assert len(parts) >= 200 // 50


@pytest.fixture
def two_files(tiny: Path, tmp_path: Path) -> Path:
    source = tmp_path / "two-files"
    load(tiny).save_pretrained(source, max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    return source


def test_a_killed_export_is_resumed(two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_fakequant(two_files, tmp_path / "whole", format="nvfp4")
    out, written = tmp_path / "out", []
    real = run.ShardWriter.__init__

    def stop_at_the_third(self: Any, path: Path, *args: Any) -> None:
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        real(self, path, *args)

    monkeypatch.setattr(run.ShardWriter, "__init__", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        export_fakequant(two_files, out, format="nvfp4")
    work = tmp_path / ".out.partial"
    finished = sorted(p.name for p in (work / "journal").iterdir())
    assert finished and not out.exists()
    written.clear()
    monkeypatch.setattr(
        run.ShardWriter, "__init__", lambda s, p, *a: (written.append(p.name), real(s, p, *a))[1]
    )
    with pytest.raises(UsageError, match="partial output of another job"):
        export_fakequant(two_files, out, format="fp8")
    export_fakequant(two_files, out, format="nvfp4")
    assert not {f"{name}.json" for name in written} & set(finished)
    assert hashes(out) == hashes(tmp_path / "whole") and not work.exists()


def test_without_resume_a_partial_output_is_discarded(two_files: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    (work / "journal").mkdir(parents=True)
    (work / "key.json").write_text("{}")
    (work / "journal" / "model.json").touch()
    export_fakequant(two_files, tmp_path / "out", format="fp8", resume=False)
    assert verify_files(tmp_path / "out") == [] and not work.exists()


@pytest.mark.parametrize("room", [True, False])
def test_ranks_give_the_same_bytes(
    two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """Ranks divide the text where there is room for a model each; then rank 2 sees no text and has none."""
    from loadstone.fakequant import calibrate as module

    text = [torch.arange(start, start + 20)[None] for start in (3, 60, 200)][: 3 if room else 2]

    def work() -> None:
        export_fakequant(
            two_files, tmp_path / "out", format="nvfp4", calibrate=text, kv_cache="fp8", device="cpu"
        )

    work()
    one = hashes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "one")
    measure, seen = module._run, []

    def counted(model: object, batches: list[torch.Tensor], *args: Any, **options: Any) -> None:
        seen.append(len(batches))
        measure(model, batches, *args, **options)

    monkeypatch.setattr(module, "_run", counted)

    def ranked() -> None:
        if not room and int(os.environ["LOCAL_RANK"]):
            os.environ["LOCAL_RANK"] = "999999999"
        work()
        assert seen == ([1] if room else [2] if os.environ["RANK"] == "0" else [])

    on_ranks(3, ranked)
    assert hashes(tmp_path / "out") == one


def test_the_same_bytes_every_time_and_tampering_is_found(tiny: Path, tmp_path: Path) -> None:
    for name in "ab":
        export_fakequant(tiny, tmp_path / name, format="nvfp4")
    every = [{p.name: sha256_file(p) for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert every[0] == every[1] and verify_files(tmp_path / "a") == []
    for name, text in (("fakequant_manifest.json", '"nvfp4"'), ("config.json", "llama")):
        path = tmp_path / "a" / name
        path.write_text(path.read_text().replace(text, text.upper(), 1))
        assert any(problem.startswith(f"{name}: content differs") for problem in verify_files(tmp_path / "a"))

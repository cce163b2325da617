"""Live models: the bytes of the directory's export from every kind of offload, and the model as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakequant.conftest import SET_UPS, Snapshot, hashes, load, logits, manifest, tensors

from loadstone import export_fakequant
from loadstone.errors import ArtifactError, UsageError


@pytest.fixture(scope="module")
def expected(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The directory's own export, made once."""
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp("expected") / "out"
            export_fakequant(make_model(arch), made[arch], format="nvfp4")
        return made[arch]

    return make


@pytest.mark.parametrize("arch", ["llama-tied", "llama-untied", "qwen3-moe"])
def test_resident_equals_directory(
    arch: str, make_model: Callable[..., Path], expected: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(make_model(arch))
    before = Snapshot(model)
    export_fakequant(model, tmp_path / "out", format="nvfp4")
    assert hashes(tmp_path / "out") == hashes(expected(arch))
    before.check()


@pytest.mark.parametrize("arch", ["llama-tied", "llama-untied", "qwen3-moe"])
def test_offloaded_equals_directory(
    arch: str,
    set_up: Callable[[Path, Path], Any],
    make_model: Callable[..., Path],
    expected: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model = set_up(make_model(arch), tmp_path / "offload")
    assert any(p.device.type == "meta" for p in model.parameters())
    before = Snapshot(model)
    export_fakequant(model, tmp_path / "out", format="nvfp4")
    assert hashes(tmp_path / "out") == hashes(expected(arch))
    before.check()


def test_what_lies_beside_an_offloaded_models_weights(
    set_up: Callable[[Path, Path], Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(make_model("llama-tied"), tmp_path / "source"))
    for name in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
        (source / name).write_text('{"max_length":  7}')
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | code | {"nested": {"deep": [code]}}))
    model = set_up(source, tmp_path / "offload")
    # As a model has it whose code came with it.
    model.config.auto_map = code["auto_map"]
    export_fakequant(model, tmp_path / "out", format="fp8")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "auto_map" not in text and json.loads(text)["nested"] == {"deep": [{}]}
    assert model.config.auto_map == code["auto_map"]
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(ArtifactError, match=r"auto_map needs modeling_x\.py"):
        export_fakequant(model, tmp_path / "copied", format="fp8", remote_code="copy")
    assert not (tmp_path / "copied").exists()


def test_no_hook_runs(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.hooks import AlignDevicesHook

    model = SET_UPS["cpu_offload"](make_model("llama-tied"), tmp_path)
    for name in ("pre_forward", "post_forward", "init_hook", "detach_hook"):
        monkeypatch.setattr(AlignDevicesHook, name, lambda *args, **options: pytest.fail("a hook ran"))
    export_fakequant(model, tmp_path / "out", format="fp8")


def small(layers: int = 2, **options: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, **sizes, **options)
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


def test_layers_1_and_10_never_cross(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = small(layers=12)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    cpu_offload(model, execution_device=torch.device("cpu"))
    export_fakequant(model, tmp_path / "out", rules=_only("re:model.layers.1.mlp.up_proj"))
    found = tensors(tmp_path / "out")
    changed = {n for n, w in weights.items() if not torch.equal(found[n], w)}
    assert changed == {"model.layers.1.mlp.up_proj.weight"}


def _only(pattern: str, name: str = "int8") -> Any:
    from loadstone.fakequant.formats import parse_format
    from loadstone.fakequant.rules import Rule, RuleSet

    return RuleSet(None, (Rule(pattern, parse_format(name)),))


def test_a_child_hook_beats_its_parent(tmp_path: Path) -> None:
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

    from loadstone.fakequant.offload import data_of

    outer = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta")))
    cpu = torch.device("cpu")

    def hook(value: float, key: str, **options: Any) -> AlignDevicesHook:
        made = AlignDevicesHook(
            execution_device=cpu, offload=True, weights_map={key: torch.full((4, 4), value)}, **options
        )
        made.init_hook = lambda module: module  # type: ignore[method-assign]
        return made

    add_hook_to_module(outer, hook(3.0, "0.0.weight", place_submodules=True))
    name, weight = "0.0.weight", outer[0][0].weight
    assert data_of(outer, name, weight)[0, 0] == 3
    add_hook_to_module(outer[0], hook(2.0, "0.weight", place_submodules=True))
    assert data_of(outer, name, weight)[0, 0] == 2
    add_hook_to_module(outer[0][0], SequentialHook(hook(1.0, "weight"), SequentialHook(hook(9.0, "bias"))))
    assert data_of(outer, name, weight)[0, 0] == 1
    # A parent that was not placed for its children does not answer for them.
    alone = torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"))
    add_hook_to_module(alone, hook(3.0, "0.weight"))
    with pytest.raises(ArtifactError, match=r"'0\.weight' is on the meta device and no offload hook"):
        data_of(alone, "0.weight", alone[0].weight)


@pytest.mark.parametrize("name", ["quantize_proj", "dequant_proj", "weight_quantizer"])
def test_a_meta_weight_is_an_error_whatever_its_name(name: str, tmp_path: Path) -> None:
    model = small()
    model.model.layers[0].mlp.register_module(name, torch.nn.Linear(32, 32, bias=False, device="meta"))
    with pytest.raises(ArtifactError, match=f"mlp.{name}.weight' (is on the meta device|belongs to no part)"):
        export_fakequant(model, tmp_path / "out", format="fp8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["shape", "dtype", "gone", "file", "stranger"])
def test_what_is_wrong_with_a_hook_is_said(fault: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import ModelHook

    model = small()
    offload = tmp_path / "offload"
    if fault == "file":
        disk_offload(model, offload, execution_device=torch.device("cpu"))
        (offload / "model.layers.0.mlp.up_proj.weight.dat").unlink()
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    up = model.model.layers[0].mlp.up_proj
    says = {
        "shape": r"is torch.bfloat16 \[64, 32\] and its offload hook has torch.bfloat16 \[32, 64\]",
        "dtype": r"and its offload hook has torch.float32",
        "gone": "no offload hook has its data",
        "file": "offloaded to a file that cannot be read",
        "stranger": "under a Stranger, an offload hook of an unknown kind",
    }
    if fault in ("shape", "dtype"):
        right = up._hf_hook.weights_map["weight"]
        up._hf_hook.weights_map = {"weight": right.t() if fault == "shape" else right.float()}
    elif fault == "gone":
        up._hf_hook.weights_map = {}
    elif fault == "stranger":
        up._hf_hook = type("Stranger", (ModelHook,), {})()
    with pytest.raises(ArtifactError, match=rf"'model\.layers\.0\.mlp\.up_proj\.weight'.*{says[fault]}"):
        export_fakequant(model, tmp_path / "out", format="fp8")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.writing").exists()


@pytest.mark.parametrize(
    "where",
    [
        "writing.shards.ShardWriter.__init__",
        "writing.shards.ShardWriter.write",
        "fakequant.export.write_index",
        "fakequant.export.copy_files",
        "fakequant.export.config_text",
        "fakequant.export.write_state",
        "fakequant.export.write_manifests",
        "fakequant.export._verify",
        "writing.publish.publish",
    ],
)
def test_a_failure_at_each_write_leaves_no_output_and_the_model_as_it_was(
    where: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SET_UPS["dispatched"](make_model("llama-tied"), tmp_path / "offload")
    before = Snapshot(model)

    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(f"loadstone.{where}", fail)
        with pytest.raises(OSError, match="disk full"):
            export_fakequant(model, tmp_path / "exports" / "out", format="fp8")
    assert not any((tmp_path / "exports").glob("*")) and not any((tmp_path / "exports").glob(".*"))
    before.check()
    export_fakequant(model, tmp_path / "exports" / "out", format="fp8")


def test_real_weights_called_quantizer_are_kept(tmp_path: Path) -> None:
    import transformers

    config = transformers.MimiConfig(
        hidden_size=32, num_filters=4, num_residual_layers=1, num_quantizers=4, codebook_size=16, codebook_dim=8,
        vector_quantization_hidden_dimension=8, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, upsample_groups=32, head_dim=16,
    )  # fmt: skip
    model = transformers.MimiModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    export_fakequant(model, tmp_path / "live", format="int8")
    export_fakequant(tmp_path / "model", tmp_path / "directory", format="int8")
    stored = tensors(tmp_path / "model")
    kept = [name for name in stored if "quantizer" in name]
    assert len(kept) >= 16
    for out in ("live", "directory"):
        found = tensors(tmp_path / out)
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[n], stored[n]) for n in kept if "codebook" in n)


def test_tied_weights_are_one_copy_with_equal_logits(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = load(make_model("llama-tied"))
    export_fakequant(model, tmp_path / "out", format="fp8")
    assert manifest(tmp_path / "out")["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
    found = tensors(tmp_path / "out")
    assert "lm_head.weight" not in found
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_tied_sides_that_differ_are_an_error(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = SET_UPS["cpu_offload"](make_model("llama-tied"), tmp_path)
    model.lm_head._hf_hook.weights_map = {"weight": model.lm_head._hf_hook.weights_map["weight"] + 1}
    with pytest.raises(ArtifactError, match=r"'lm_head\.weight' and 'model\.embed_tokens\.weight' are tied"):
        export_fakequant(model, tmp_path / "out", format="fp8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["live", "directory"])
def test_one_side_of_a_tie(source: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_model("llama-tied")
    given = load(directory) if source == "live" else directory
    with pytest.raises(
        UsageError, match=r"'lm_head\.weight' would be folded and 'model\.embed_tokens\.weight'"
    ):
        export_fakequant(given, tmp_path / "out", rules=_only("lm_head"))
    export_fakequant(given, tmp_path / "out", rules=_only("lm_head"), untie=True)
    found = tensors(tmp_path / "out")
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    model = load(directory)
    model.lm_head.weight = torch.nn.Parameter(found["lm_head.weight"])
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    # Both sides by one rule: still one tensor.
    export_fakequant(given, tmp_path / "both", rules=_only("re:lm_head|model.embed_tokens"))
    assert "lm_head.weight" not in tensors(tmp_path / "both")


def test_shared_storage_and_views_are_written_with_their_own_values(tmp_path: Path) -> None:
    model = small(tie_word_embeddings=False)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    storage = torch.randn(2, 64, 32, dtype=torch.bfloat16)
    layers[0].mlp.gate_proj.weight = torch.nn.Parameter(storage[0])
    layers[1].mlp.gate_proj.weight = torch.nn.Parameter(storage[1])
    layers[0].self_attn.q_proj.weight = torch.nn.Parameter(torch.randn(32, 32, dtype=torch.bfloat16).t())
    export_fakequant(model, tmp_path / "out", rules=_only("lm_head"))
    found = tensors(tmp_path / "out")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert name == "lm_head.weight" or torch.equal(found[name], parameter), name
    total = sum(t.nbytes for t in found.values())
    assert manifest(tmp_path / "out")["total_size"] == total


def test_shards_of_a_live_model(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = load(make_model("qwen3-moe"))
    export_fakequant(model, tmp_path / "one", format="mxfp8")
    export_fakequant(model, tmp_path / "many", format="mxfp8", max_shard_size=60_000)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*"))) > 3
    assert one.keys() == many.keys() and all(torch.equal(one[k], many[k]) for k in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in many.values())
    assert set(index["weight_map"]) == set(many)


def test_experts_go_out_under_the_names_of_save_pretrained(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(make_model("qwen3-moe"))
    model.save_pretrained(tmp_path / "saved")
    export_fakequant(model, tmp_path / "out", format="int8")
    saved, found = tensors(tmp_path / "saved"), tensors(tmp_path / "out")
    assert saved.keys() == found.keys()
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    from loadstone.fakequant.formats import FORMATS
    from loadstone.fakequant.formats.fold import fold

    assert torch.equal(found[name], fold(name, saved[name], FORMATS["int8"].weight))
    folded = load(tmp_path / "out")
    with torch.no_grad():
        for target, source in zip(model.parameters(), folded.parameters(), strict=True):
            target.copy_(source)
    assert torch.equal(logits(folded), logits(model))


def test_a_model_trained_with_torchao_exports_what_it_computes(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    model = load(make_model("llama-untied"))
    base = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(
        model, QATConfig(base, step="prepare"), lambda m, n: isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    before = Snapshot(model)
    with pytest.raises(UsageError, match="weight quantizers of its own"):
        export_fakequant(model, tmp_path / "out", format="fp8")
    with monkeypatch.context() as patch:
        patch.setattr("loadstone.writing.publish.publish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_fakequant(model, tmp_path / "out")
    before.check()
    before = Snapshot(model)
    export_fakequant(model, tmp_path / "out")
    before.check()
    assert not any("quantizer" in name for name in tensors(tmp_path / "out"))
    assert torch.equal(logits(load(tmp_path / "out")), before.logits)
    facts = manifest(tmp_path / "out")
    assert facts["tensors"]["model.layers.0.mlp.up_proj.weight"]["format"] == "IntxFakeQuantizer"
    assert facts["not_folded"]["lm_head.weight"] == "output head"


def test_no_format_for_a_plain_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no format is named"):
        export_fakequant(small(), tmp_path / "out")
    with pytest.raises(UsageError, match="is no transformers model"):
        export_fakequant(torch.nn.Linear(2, 2), tmp_path / "out", format="fp8")


def test_quantized_models_are_refused(tiny: Path, quantize_to: Callable[..., Path], tmp_path: Path) -> None:
    import loadstone

    model = loadstone.load(quantize_to(tiny, "int8-weight-only"))
    with pytest.raises(ArtifactError, match="already quantized"):
        export_fakequant(model, tmp_path / "out", format="fp8")
    model.hf_quantizer = model.quantization_method = None
    del model.config.quantization_config
    with pytest.raises(ArtifactError, match="is a Int8Tensor, not a plain tensor"):
        export_fakequant(model, tmp_path / "out", format="fp8")


def test_an_enabled_quantizer_folds_its_weight_once() -> None:
    from loadstone.fakequant.quantizers import OwnQuantizers

    own = OwnQuantizers(None, weights={"a.weight": torch.nn.Identity()})
    with pytest.raises(ArtifactError, match=r"'a\.weight' has an enabled quantizer and was not folded"):
        own.check_done()
    own.folded("a.weight", torch.ones(2, 2))
    own.check_done()
    with pytest.raises(ArtifactError, match=r"'a\.weight' came to its quantizer twice"):
        own.folded("a.weight", torch.ones(2, 2))


def test_quantizers_of_the_models_own_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pattern for each of a mixture's ten thousand experts would be tried on every one of them.
    from loadstone.fakequant import rules
    from loadstone.fakequant.formats.spec import Format, Own

    monkeypatch.setattr(rules, "matches", lambda *args: pytest.fail("a pattern was tried"))
    own = Format("TensorQuantizer", Own("TensorQuantizer"))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    roles = {name: (rules.Role(eligible=False), (64, 64)) for name in names}
    decisions = rules.decide(rules.RuleSet(None, own=dict.fromkeys(names[:2], own)), roles)
    assert [d.format for d in decisions.values()] == [own, own, None]
    assert str(decisions[names[0]].rule) == "model.layers.0.mlp.up_proj: TensorQuantizer"

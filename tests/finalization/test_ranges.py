"""NVFP4 with quantized inputs: the ranges that are stored are those that a fake-quant export measures."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import write_tokenizer

import loadstone
from loadstone.artifact.report import collect
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.calibrate import calibration_rows
from loadstone.finalization.journal import work_directory
from loadstone.quantization import parse_recipe, to_torchao

RECIPE = "nvfp4-dynamic-act-nvfp4-weight"
TEXT = ["the quick brown fox jumps over the lazy dog and runs away " * 30]
OPTIONS = {"recipe": RECIPE, "layout": "compressed-tensors", "calibrate": TEXT, "calibrate_tokens": 512}


def stored(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def exported_ranges(source: Path, rows: torch.Tensor) -> dict[str, float]:
    """The ranges by the code of `export_fakequant`, on the whole model at once."""
    from loadstone.fakequant.calibrate import calibrate
    from loadstone.fakequant.directory import plan_directory
    from loadstone.fakequant.options import make_options

    options = make_options(format="nvfp4", calibrate=list(rows))
    artifact = loadstone.detect(source)
    plan = plan_directory(artifact, options.rules)
    state = calibrate(loadstone.load(source, dtype="float32"), plan, options, [row[None] for row in rows])
    return {name.removesuffix(".amax"): float(value) for name, value in state.tensors.items()}


@pytest.mark.parametrize("family", ["llama-tied", "qwen3-moe", "llama4"])
def test_ranges_are_those_of_an_export(
    family: str, make_model: Callable[..., Path], experts_model: Callable[[str], Path], tmp_path: Path
) -> None:
    if family == "llama4":
        # Its experts compute the input of their last product within their forward.
        source = Path(shutil.copytree(experts_model(family), tmp_path / "source"))
        write_tokenizer(source)
    else:
        source = make_model(family)
    planned = loadstone.plan_finalize(source, **{k: v for k, v in OPTIONS.items() if k != "calibrate_tokens"})
    done = loadstone.finalize(source, tmp_path / "out", verify=True, **OPTIONS)
    assert done.verified and planned.bytes_after == sum(
        t.nbytes for t in loadstone.detect(tmp_path / "out").tensors.values()
    )
    expected = exported_ranges(source, calibration_rows(planned, TEXT, 512))
    found = {n: t for n, t in stored(tmp_path / "out").items() if n.endswith("input_global_scale")}
    packed = loadstone.detect(tmp_path / "out").packed
    assert found.keys() == {f"{weight.module}.input_global_scale" for weight in packed.values()}
    for name, scale in found.items():
        module = name.removesuffix(".input_global_scale")
        owner, _, last = module.rpartition(".")
        if ".experts." in module:
            last = "down_proj" if last == "down_proj" else "gate_up_proj"
            largest = expected[f"{owner.rpartition('.')[0]}.{last}_input_quantizer"]
        else:
            largest = expected[f"{module}.input_quantizer"]
        # A model in one piece and its layers one by one may take attention kernels that differ in the last bit.
        assert float(scale) == pytest.approx(448 * 6 / largest, rel=1e-6), name
    assert collect(tmp_path / "out").serving == ()
    # Weights are those of the scheme without inputs.
    loadstone.finalize(source, tmp_path / "a16", recipe="nvfp4-weight-only", layout="compressed-tensors")
    weights = stored(tmp_path / "a16")
    both = stored(tmp_path / "out")
    assert weights.keys() == both.keys() - found.keys()
    assert all(torch.equal(t.view(torch.uint8), both[n].view(torch.uint8)) for n, t in weights.items())


def test_text_is_needed(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="range of the inputs") as error:
        loadstone.plan_finalize(tiny, recipe=RECIPE, layout="compressed-tensors")
    assert "--calibrate" in error.value.remedy
    (tmp_path / "r.yaml").write_text(
        f"default: int8-weight-only\nrules:\n  - {{modules: mlp, scheme: {RECIPE}}}\n"
    )
    with pytest.raises(UsageError, match="range of the inputs"):
        loadstone.plan_finalize(tiny, recipe=tmp_path / "r.yaml", layout="compressed-tensors")


def test_calibrated_rounding_beside_measured_inputs(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"default: intx4-weight-only\nrules:\n  - {{modules: mlp, scheme: {RECIPE}}}\n"
    )
    loadstone.finalize(tiny, tmp_path / "out", **OPTIONS | {"recipe": tmp_path / "r.yaml"})
    loadstone.finalize(tiny, tmp_path / "alone", **OPTIONS)
    loadstone.finalize(tiny, tmp_path / "gptq", **OPTIONS | {"recipe": "intx4-weight-only"})
    found, alone, gptq = (stored(tmp_path / name) for name in ("out", "alone", "gptq"))
    for name in (n for n in found if n.endswith("mlp.down_proj.input_global_scale")):
        assert torch.equal(found[name], alone[name])
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    assert torch.equal(found[name], gptq[name])


def test_a_head_cannot_be_measured(make_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"default: skip\nlm_head: {RECIPE}\n")
    with pytest.raises(UsageError, match=r"'lm_head\.weight' is not in a decoder layer"):
        loadstone.finalize(
            make_model("llama-untied"), tmp_path / "out", **OPTIONS | {"recipe": tmp_path / "r.yaml"}
        )
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_finite_name_the_layer(tiny: Path, tmp_path: Path) -> None:
    model = loadstone.load(tiny)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(1e38)
    model.to(torch.float32).save_pretrained(tmp_path / "m")
    for file in tiny.glob("tokenizer*"):
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ArtifactError, match=r"inputs of 'model\.layers\.1.*NaN or infinite"):
        loadstone.finalize(tmp_path / "m", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_shards_of_another_text_are_not_taken_over(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loadstone.finalization import run

    finish, count = run.note_finished, []

    def killed(*args: object) -> None:
        finish(*args)
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    options = OPTIONS | {"max_shard_size": 12_000}
    loadstone.finalize(tiny, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(run, "note_finished", killed)
        with pytest.raises(KeyboardInterrupt):
            loadstone.finalize(tiny, tmp_path / "out", **options)
    assert work_directory(tmp_path / "out").exists()
    with pytest.raises(UsageError, match="calibration"):
        loadstone.finalize(tiny, tmp_path / "out", **options | {"calibrate": ["other words " * 300]})
    loadstone.finalize(tiny, tmp_path / "out", **options)
    first, second = stored(tmp_path / "whole"), stored(tmp_path / "out")
    assert first.keys() == second.keys()
    assert all(torch.equal(t.view(torch.uint8), second[n].view(torch.uint8)) for n, t in first.items())


def test_a_torchao_artifact_with_rounded_inputs_is_not_moved(tiny: Path, tmp_path: Path) -> None:
    """Its tensors say that inputs are rounded, and no range of them is stored."""
    loadstone.finalize(tiny, tmp_path / "torchao", recipe="nvfp4-weight-only")
    from safetensors import safe_open
    from safetensors.torch import save_file
    from torchao.core.config import config_to_dict

    file = tmp_path / "torchao" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
    config = json.loads((tmp_path / "torchao" / "config.json").read_text())
    kwargs = {
        "_type": "QuantizeTensorToNVFP4Kwargs", "_data": {"block_size": 16, "is_swizzled_scales": True}
    }  # fmt: skip
    for name, entry in metadata.items():
        about = json.loads(entry) if entry.startswith("{") else {}
        if about.get("_type") == "NVFP4Tensor":
            about["_data"]["act_quant_kwargs"] = kwargs
            metadata[name] = json.dumps(about)
    save_file(tensors, file, metadata)
    recipe = config_to_dict(to_torchao(parse_recipe(RECIPE).scheme))
    config["quantization_config"]["quant_type"]["default"] = recipe
    (tmp_path / "torchao" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="measured on text"):
        loadstone.finalize(tmp_path / "torchao", tmp_path / "out", layout="compressed-tensors")


def without_minus_zero(packed: torch.Tensor) -> torch.Tensor:
    """torchao keeps the sign of what it rounds to zero, compressed-tensors does not."""
    low, high = packed & 0xF, packed >> 4
    low, high = (torch.where(each == 8, 0, each) for each in (low, high))
    return low | (high << 4)


@pytest.mark.serving
def test_bytes_are_those_of_compressed_tensors(tiny: Path, tmp_path: Path) -> None:
    """Its own compressor packs our rounded weights to our bytes, and gives our scales of the inputs."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import generate_gparam

    loadstone.finalize(tiny, tmp_path / "out", **OPTIONS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    found = stored(tmp_path / "out")
    planned = loadstone.plan_finalize(tiny, **{k: v for k, v in OPTIONS.items() if k != "calibrate_tokens"})
    ranges = exported_ranges(tiny, calibration_rows(planned, TEXT, 512))
    for weight in loadstone.detect(tmp_path / "out").packed.values():
        parts = {
            s: found[f"{weight.module}.{s}"] for s in ("weight_packed", "weight_scale", "weight_global_scale")
        }
        plain = compressor.decompress(parts, scheme)["weight"].float()
        state = {"weight": plain} | {n: t.float() for n, t in parts.items() if n != "weight_packed"}
        packed = compressor.compress(state, scheme)["weight_packed"]
        assert torch.equal(without_minus_zero(packed), without_minus_zero(parts["weight_packed"]))
        largest = torch.tensor(ranges[f"{weight.module}.input_quantizer"])
        scale = found[f"{weight.module}.input_global_scale"]
        assert float(generate_gparam(-largest, largest)) == pytest.approx(float(scale), rel=1e-6)
        assert scale.dtype == torch.float32 and scale.shape == (1,)


def test_two_ranks_give_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    """Rank 0 measures, both read what it found."""
    (tmp_path / "text.txt").write_text(TEXT[0])
    options = OPTIONS | {"calibrate": str(tmp_path / "text.txt"), "max_shard_size": 12_000}
    loadstone.finalize(tiny, tmp_path / "one", **options)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "loadstone",
        "finalize", "-M", tiny, "-o", tmp_path / "two", "--quantize", RECIPE, "--layout", "compressed-tensors",
        "--calibrate", tmp_path / "text.txt", "--calibrate-tokens", "512", "--max-shard-size", "12000B",
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert first.keys() == second.keys() and len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    assert all(torch.equal(t.view(torch.uint8), second[n].view(torch.uint8)) for n, t in first.items())

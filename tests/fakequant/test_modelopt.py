"""ModelOpt's state file; and, where ModelOpt is (`make test-modelopt`), its own reload of it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakequant.conftest import SET_UPS, TOKENS, Snapshot, hashes, load, logits, tensors

import loadstone
from loadstone import export_fakequant
from loadstone.errors import ArtifactError
from loadstone.fakequant.formats import FORMATS
from loadstone.fakequant.formats.fold import fold
from loadstone.fakequant.inputs import apply_export
from loadstone.fakequant.modelopt_state import MODELOPT_FILE, read_modelopt_state
from loadstone.fakequant.state import read_state


@pytest.mark.parametrize("text", ["fp8", "mxfp8"])
def test_state_file(text: str, tiny: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibrate": [TOKENS]} if text == "fp8" else {}
    for name in "ab":
        export_fakequant(tiny, tmp_path / name, format=text, activations=True, emit="modelopt", **options)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    content = read_modelopt_state(tmp_path / "a")
    (mode, parts), *_ = content["modelopt_state_dict"]
    states, weights = parts["metadata"]["quantizer_state"], content["modelopt_state_weights"]
    assert mode == "quantize" and states.keys() == weights.keys()
    assert not any("weight_quantizer" in name for name in states)
    on = [name for name, state in states.items() if not state["_disabled"]]
    assert len(on) == 14 and all(name.endswith(".input_quantizer") for name in on)
    assert all(bool(weights[name]) == (text == "fp8") for name in on)


def test_a_state_file_with_code_is_refused(tiny: Path, tmp_path: Path) -> None:
    export_fakequant(tiny, tmp_path / "out", format="mxfp8", activations=True, emit="modelopt")

    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, ("touch " + str(tmp_path / "ran"),)

    torch.save({"modelopt_version": Hostile()}, tmp_path / "out" / MODELOPT_FILE)
    with pytest.raises(ArtifactError, match="cannot be read with weights_only=True"):
        read_modelopt_state(tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    torch.save({"other": 1}, tmp_path / "out" / MODELOPT_FILE)
    with pytest.raises(ArtifactError, match="not a ModelOpt state file"):
        read_modelopt_state(tmp_path / "out")


def reload(model: Any, directory: Path) -> Any:
    """What ModelOpt's vLLM worker does with the file, for a transformers model: convert, fill in what the file leaves
    out with weight quantizers off, restore, load the tensors, fold."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.opt.conversion import ModeloptStateManager
    from modelopt.torch.quantization.conversion import (
        convert_to_quantized_model,
        quantizer_state,
        restore_quantizer_state,
    )

    content = read_modelopt_state(directory)
    manager = ModeloptStateManager(model=model, init_state=True)
    manager.load_state_dict(content["modelopt_state_dict"], content["modelopt_version"])
    for _, config, metadata in manager.modes_with_states():
        convert_to_quantized_model(model, config)
        saved = metadata["quantizer_state"]
        whole = {
            k: saved[k] if k in saved else v | {"_disabled": True} for k, v in quantizer_state(model).items()
        }
        restore_quantizer_state(model, config, metadata | {"quantizer_state": whole})
    mtq.utils.set_quantizer_state_dict(model, content["modelopt_state_weights"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mtq.fold_weight(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    found = [m for n, m in model.named_modules() if "weight_quantizer" in n and hasattr(m, "is_enabled")]
    assert found and not any(m.is_enabled for m in found)
    return model


@pytest.mark.modelopt
@pytest.mark.parametrize("text", ["fp8", "int8", "w4a8", "fp8:granularity=row"])
def test_modelopt_reloads_it(text: str, tiny: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if "row" in text else {"calibrate": [TOKENS]}
    export_fakequant(tiny, tmp_path / "out", format=text, activations=True, emit="modelopt", **options)
    theirs = logits(reload(load(tmp_path / "out"), tmp_path / "out"))
    ours = load(tmp_path / "out")
    assert apply_export(ours, loadstone.detect(tmp_path / "out")) == 14
    assert torch.equal(theirs, logits(ours))


@pytest.mark.modelopt
def test_modelopt_reloads_experts(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model("qwen3-moe", dtype="float32")
    export_fakequant(source, tmp_path / "out", format="fp8", calibrate=[TOKENS], emit="modelopt")
    options = {"experts_implementation": "eager"}
    theirs = reload(load(tmp_path / "out", **options), tmp_path / "out")
    on = {n for n, m in theirs.named_modules() if n.endswith("input_quantizer") and m.is_enabled}
    assert on == set(read_state(tmp_path / "out").specs) and len(on) == 12
    ours = load(tmp_path / "out")
    apply_export(ours, loadstone.detect(tmp_path / "out"))
    assert torch.allclose(logits(theirs), logits(ours), atol=2e-3)


CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "w4a8": "W4A8_AWQ_BETA_CFG",
}


def quantized(directory: Path, name: str, **options: Any) -> Any:
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, name)) | {"algorithm": "max"}
    model = load(directory, **options)
    return mtq.quantize(model, config, lambda m: m(TOKENS))


@pytest.mark.modelopt
@pytest.mark.parametrize("text", CONFIGS)
def test_models_with_modelopt_quantizers(
    text: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("llama-untied")
    model = quantized(source, CONFIGS[text])
    before = Snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr("loadstone.writing.publish.publish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_fakequant(model, tmp_path / "live", emit="modelopt")
    before.check()
    before = Snapshot(model)
    export_fakequant(model, tmp_path / "live", emit="modelopt")
    before.check()
    export_fakequant(source, tmp_path / "directory", format=text)
    live, directory = tensors(tmp_path / "live"), tensors(tmp_path / "directory")
    assert live.keys() == directory.keys() and all(torch.equal(live[k], directory[k]) for k in live)
    after = logits(reload(load(tmp_path / "live"), tmp_path / "live"))
    # Between its two stages the live model rounds to bfloat16, an export does not.
    assert (
        torch.allclose(after, before.logits, atol=0.02)
        if text == "w4a8"
        else torch.equal(after, before.logits)
    )


@pytest.mark.modelopt
@pytest.mark.parametrize("name", ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG"])
def test_smoothed_models(name: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq

    # Smoothing scales stay with the quantizers that are on, and go into the weights of those that are off.
    model = load(make_model("llama-untied", dtype="float32"))
    mtq.quantize(model, copy.deepcopy(getattr(mtq, name)), lambda m: m(TOKENS))
    before = Snapshot(model)
    export_fakequant(model, tmp_path / "out")
    before.check()
    ours, state = load(tmp_path / "out"), read_state(tmp_path / "out")
    kept = [n for n in state.tensors if n.endswith("pre_quant_scale")]
    assert len(kept) == (14 if name == "INT8_SMOOTHQUANT_CFG" else 0)
    assert apply_export(ours, loadstone.detect(tmp_path / "out")) == len(kept)
    assert torch.allclose(logits(ours), before.logits, atol=1e-5)
    plain = load(make_model("llama-untied", dtype="float32"))
    assert not torch.allclose(logits(plain), before.logits, atol=1e-3)


@pytest.mark.modelopt
def test_experts_with_modelopt_quantizers(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source, options = make_model("qwen3-moe", dtype="float32"), {"experts_implementation": "eager"}
    model = quantized(source, "FP8_DEFAULT_CFG", **options)
    before = Snapshot(model)
    export_fakequant(model, tmp_path / "live", emit="modelopt")
    before.check()
    export_fakequant(source, tmp_path / "directory", format="fp8")
    live, directory = tensors(tmp_path / "live"), tensors(tmp_path / "directory")
    assert live.keys() == directory.keys()
    # A fused weight has one quantizer for gate and up, where a directory's export has one for each.
    pairs = {n: n.replace("gate_proj", "up_proj") for n in live if "experts" in n and "gate_proj" in n}
    assert all(torch.equal(live[n], directory[n]) for n in live if n not in {*pairs, *pairs.values()})
    stored = tensors(source)
    for gate, up in pairs.items():
        both = fold(gate, torch.cat([stored[gate], stored[up]]), FORMATS["fp8"].weight)
        assert torch.equal(torch.cat([live[gate], live[up]]), both)
    specs = read_state(tmp_path / "live").specs
    assert "model.layers.1.mlp.experts.down_proj_input_quantizer" in specs and len(specs) == 12
    after = logits(reload(load(tmp_path / "live", **options), tmp_path / "live"))
    assert torch.equal(after, before.logits)
    ours = load(tmp_path / "live")
    apply_export(ours, loadstone.detect(tmp_path / "live"))
    assert torch.allclose(logits(ours), before.logits, atol=2e-3)


@pytest.mark.modelopt
def test_same_weights_as_modelopts_own_export(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from modelopt.torch.export.plugins.vllm_fakequant_hf import export_hf_vllm_fq_checkpoint

    source = make_model("llama-untied")
    model = quantized(source, "FP8_DEFAULT_CFG")
    export_hf_vllm_fq_checkpoint(model, export_dir=tmp_path / "theirs")
    export_fakequant(source, tmp_path / "ours", format="fp8")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.modelopt
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_offloaded_where_modelopts_export_fails(
    way: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    from modelopt.torch.export.plugins.vllm_fakequant_hf import export_hf_vllm_fq_checkpoint

    source = make_model("llama-untied")
    model = SET_UPS[way](source, tmp_path / "offload")
    with pytest.raises(Exception, match=r"meta|state_dict|quantiz"):
        import modelopt.torch.quantization as mtq

        config = copy.deepcopy(mtq.FP8_DEFAULT_CFG) | {"algorithm": "max"}
        export_hf_vllm_fq_checkpoint(
            mtq.quantize(model, config, lambda m: m(TOKENS)), export_dir=tmp_path / "theirs"
        )
    fresh = SET_UPS[way](source, tmp_path / "offload2")
    export_fakequant(fresh, tmp_path / "ours", format="fp8")
    export_fakequant(source, tmp_path / "expected", format="fp8")
    assert hashes(tmp_path / "ours") == hashes(tmp_path / "expected")

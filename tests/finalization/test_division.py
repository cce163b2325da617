"""Experts of every layout are stored one by one as (out, in), and loaded back into the layout of the model's module."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import logits, stock
from tests.mixtures import FAMILIES, SIZES

import loadstone
from loadstone.artifact.servers import MERGED_ONLY, runs_of
from loadstone.loading.meta import meta_model
from loadstone.quantization import parse_recipe
from loadstone.quantization.model_facts import ExpertLayout, facts_of
from loadstone.quantization.quantize import quantize_weight

from .test_finalize import snapshot


def matrices(parameter: torch.Tensor, layout: ExpertLayout, parts: int) -> list[list[torch.Tensor]]:
    """Each expert's matrices (out, in) out of a merged parameter."""
    upright = parameter.transpose(1, 2) if layout.transposed else parameter
    if parts == 1:
        return [[each] for each in upright]
    if layout.interleaved:
        return [[each[0::2], each[1::2]] for each in upright]
    return [list(each.chunk(2)) for each in upright]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["intx4-weight-only", "nvfp4-weight-only", "float8-weight-only"])
def test_each_expert_is_quantized_as_its_module_multiplies_it(
    family: str, recipe: str, experts_model: Callable[[str], Path], tmp_path: Path
) -> None:
    _, _, layout, names = FAMILIES[family]
    planned = loadstone.plan_finalize(experts_model(family), recipe=recipe, layout="compressed-tensors")
    done = loadstone.finalize(
        experts_model(family), tmp_path / "out", recipe=recipe, layout="compressed-tensors", verify=True
    )
    assert done.verified
    artifact = loadstone.detect(tmp_path / "out")
    assert planned.bytes_after == sum(t.nbytes for t in artifact.tensors.values())
    dense, ours = loadstone.load(experts_model(family)), loadstone.load(tmp_path / "out")
    merged = [n for n, p in dense.named_parameters() if p.dim() == 3 and "experts" in n]
    assert merged
    scheme = parse_recipe(recipe).scheme
    for name in merged:
        gated = name.endswith("gate_up_proj")
        wanted = names[:2] if gated else names[2:]
        before = matrices(dense.get_parameter(name).detach(), layout, len(wanted))
        after = matrices(ours.get_parameter(name).detach(), layout, len(wanted))
        owner = name.rpartition(".")[0]
        for expert, (old, new) in enumerate(zip(before, after, strict=True)):
            for part, kind in enumerate(wanted):
                stored = f"{owner}.{expert}.{kind}.weight".replace(".mlp.", ".block_sparse_moe.")
                stored = stored if stored in artifact.packed else f"{owner}.{expert}.{kind}.weight"
                assert artifact.packed[stored].shape == tuple(old[part].shape)
                if recipe.startswith("nvfp4") and gated:
                    # One scale for gate and up.
                    assert (new[part] - old[part]).float().norm() < 0.2 * old[part].float().norm()
                    continue
                expected = quantize_weight(old[part].contiguous(), scheme).dequantize()
                assert torch.equal(new[part], expected), stored
    found = loadstone.load(tmp_path / "out")
    assert torch.equal(logits(found), logits(ours)) and logits(ours).isfinite().all()


@pytest.mark.parametrize("family", ["gpt-oss", "llama4"])
def test_a_plain_save_of_what_was_loaded_is_stocks_own(
    family: str, experts_model: Callable[[str], Path], tmp_path: Path
) -> None:
    loadstone.finalize(
        experts_model(family), tmp_path / "out", recipe="intx4-weight-only", layout="compressed-tensors"
    )
    ours = loadstone.load(tmp_path / "out")
    ours.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(stock(tmp_path / "saved")), logits(ours))
    # And so is a save of any other model of the type in this process.
    other = type(ours)(ours.config)
    other.save_pretrained(tmp_path / "other")
    assert (
        loadstone.detect(tmp_path / "other").tensors.keys()
        == loadstone.detect(experts_model(family)).tensors.keys()
    )
    loadstone.finalize(
        tmp_path / "out", tmp_path / "again", recipe="float8-weight-only", layout="compressed-tensors"
    )
    again = loadstone.load(tmp_path / "again")
    name = next(n for n, p in ours.named_parameters() if "experts.down_proj" in n and p.dim() == 3)
    assert 0 < (again.get_parameter(name) - ours.get_parameter(name)).float().abs().max() < 0.05


@pytest.mark.parametrize("family", ["gpt-oss", "llama4"])
def test_streamed_and_rounded_inputs(
    family: str, experts_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from loadstone.evaluation.served_inputs import input_changes, round_model_inputs
    from loadstone.loading.streamed import streamed

    loadstone.finalize(
        experts_model(family),
        tmp_path / "out",
        recipe="float8-dynamic-act-float8-weight",
        layout="compressed-tensors",
    )
    whole = loadstone.load(tmp_path / "out")
    with streamed(loadstone.plan(tmp_path / "out"), torch.device("cpu")) as parts:
        for name, parameter in parts.layer(1).named_parameters():
            assert torch.equal(parameter, whole.get_parameter(f"{parts.stack_name}.1.{name}"))
    changes = input_changes(loadstone.detect(tmp_path / "out"), whole)
    assert {name for name in changes if "experts" in name and "shared" not in name} == {
        n for n, p in whole.named_parameters() if p.dim() == 3 and "experts" in n
    }
    before = logits(whole)
    undo = round_model_inputs(whole, changes)
    assert 0 < (logits(whole) - before).norm() < 0.2 * before.norm()
    undo()
    assert torch.equal(logits(whole), before)


def test_a_bin_source_gives_the_same_bytes(experts_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Its tensors are no ranges of bytes."""
    from safetensors.torch import load_file

    for family in ("gpt-oss", "qwen3-moe"):
        folder = tmp_path / family
        folder.mkdir()
        shutil.copy(experts_model(family) / "config.json", folder)
        torch.save(load_file(experts_model(family) / "model.safetensors"), folder / "pytorch_model.bin")
        options = {"recipe": "intx4-weight-only", "layout": "compressed-tensors"}
        loadstone.finalize(folder, tmp_path / f"{family}-bin", **options)
        loadstone.finalize(experts_model(family), tmp_path / f"{family}-out", **options)
        one, two = snapshot(tmp_path / f"{family}-bin"), snapshot(tmp_path / f"{family}-out")
        assert one["model.safetensors"] == two["model.safetensors"]


def test_a_source_that_transformers_turns_round(tmp_path: Path) -> None:
    """Qwen3-VL-MoE stores (in, out) and its module multiplies (out, in); both orders of a checkpoint are read."""
    import transformers
    from safetensors.torch import load_file, save_file

    text = SIZES | {
        "intermediate_size": 128, "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).bfloat16()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    turned = {
        n: t.transpose(1, 2).contiguous() if t.dim() == 3 and "experts" in n else t for n, t in stored.items()
    }
    save_file(turned, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    options = {"recipe": "intx4-weight-only", "layout": "compressed-tensors"}
    for name in ("a", "b"):
        loadstone.finalize(tmp_path / name, tmp_path / f"{name}-out", verify=True, **options)
    one, two = snapshot(tmp_path / "a-out"), snapshot(tmp_path / "b-out")
    assert {**one, "loadstone.json": ""} == {**two, "loadstone.json": ""}
    ours, dense = loadstone.load(tmp_path / "a-out"), loadstone.load(tmp_path / "a")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    scheme = parse_recipe("intx4-weight-only").scheme
    for found, weight in zip(ours.get_parameter(name), dense.get_parameter(name), strict=True):
        assert torch.equal(found, quantize_weight(weight.detach(), scheme).dequantize())


def test_layouts_are_what_modules_say(experts_model: Callable[[str], Path]) -> None:
    for family, (_, _, layout, _) in FAMILIES.items():
        model = meta_model(loadstone.detect(experts_model(family)))
        found = {
            w.name.rpartition(".")[2]: w.experts for w in facts_of(model).weights if w.experts is not None
        }
        assert found == {"gate_up_proj": layout, "down_proj": layout._replace(interleaved=False)}


def test_where_experts_of_such_models_run(experts_model: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    known = _build_checkpoint_conversion_mapping()
    for kind in MERGED_ONLY:
        patterns = [p for entry in known.get(kind, ()) for p in entry.source_patterns]
        assert not any("experts" in p and "*" in p for p in patterns), kind
    for family in ("gpt-oss", "llama4"):
        done = loadstone.finalize(
            experts_model(family), tmp_path / family, recipe="intx4-weight-only", layout="compressed-tensors"
        )
        runs = {run.server: run.runs for run in runs_of(loadstone.detect(tmp_path / family))}
        assert runs == {run.server: run.runs for run in done.plan.runs}
        assert runs["transformers"] == runs["vLLM"] == (family == "llama4")


@pytest.mark.serving
@pytest.mark.parametrize("family", ["gpt-oss", "llama4"])
def test_stock_in_a_process_of_its_own(
    family: str, experts_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The row of docs/serving.md: Llama 4's experts are loaded one by one, gpt-oss's are left out in silence."""
    loadstone.finalize(
        experts_model(family), tmp_path / "out", recipe="intx4-weight-only", layout="compressed-tensors"
    )
    code = (
        "import sys, torch, transformers\n"
        "load = transformers.AutoModelForCausalLM.from_pretrained\n"
        "model, info = load(sys.argv[1], output_loading_info=True)\n"
        "with torch.no_grad():\n"
        "    torch.save(model(torch.arange(3, 35)[None]).logits, sys.argv[2])\n"
        "sys.exit(7 if any('experts' in k for k in info['missing_keys']) else 0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (7 if family == "gpt-oss" else 0), done.stderr[-500:]
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(theirs, logits(loadstone.load(tmp_path / "out"))) == (family == "llama4")

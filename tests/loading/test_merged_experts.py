"""Experts stored one by one as the one tensor that transformers loads: whole or in parts, one expert in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers import logits

import loadstone
from loadstone.errors import ArtifactError
from loadstone.fakequant import export_fakequant
from loadstone.finalization.calibrate import calibrate
from loadstone.finalization.run import write_plan
from loadstone.loading.decoded import dense_view
from loadstone.loading.merged_experts import merged_experts

FAMILIES = ("gpt-oss", "llama4", "llama4-square")


@pytest.fixture(scope="module")
def packed(
    experts_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = loadstone.finalize(
                experts_model(family),
                tmp_path_factory.mktemp(family) / "packed",
                recipe="float8-weight-only",
                layout="compressed-tensors",
            ).out
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_transformers_own_checkpoint(
    family: str, packed: Callable[[str], Path], experts_model: Callable[[str], Path]
) -> None:
    view = merged_experts(dense_view(loadstone.detect(packed(family))))
    own = loadstone.detect(experts_model(family)).tensors
    assert {name: info.shape for name, info in view.tensors.items()} == {n: i.shape for n, i in own.items()}
    model = loadstone.load(packed(family), device="cpu")
    merged = [info for info in view.tensors.values() if "experts" in info.name and len(info.shape) == 3]
    assert len(merged) == 4
    for info in merged:
        whole = view.source.read(info)
        assert torch.equal(whole, model.get_parameter(info.name))
        tile = view.source.tile(info)
        assert tile * 4 == info.numel
        assert torch.equal(view.source.read(info, 7, tile + 9), whole.flatten()[7 : tile + 9])
    # And it loads as any other checkpoint.
    assert torch.equal(logits(loadstone.load(loadstone.plan(view, device="cpu"))), logits(model))


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_calibration_and_measured_inputs_of_such_a_source(
    family: str, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    """Into layouts that need one tensor of all experts."""
    plain = loadstone.finalize(packed(family), tmp_path / "plain").out
    rows = torch.randint(3, 250, (2, 64), generator=torch.Generator().manual_seed(0))
    outs = []
    for source in (packed(family), plain):
        out = tmp_path / f"{source.name}-gptq"
        plan = loadstone.plan_finalize(
            source, recipe="intx4-weight-only:group_size=0", algorithm="gptq", calibrate=["unused"]
        )
        write_plan(calibrate(plan, rows, out), out)
        outs.append(load_file(out / "model.safetensors"))
        export_fakequant(
            source, tmp_path / f"{source.name}-fq", format="fp8", activations=True, calibrate=[rows[:1]]
        )
        outs.append(load_file(tmp_path / f"{source.name}-fq" / "fakequant_state.safetensors"))
    for one, two in ((outs[0], outs[2]), (outs[1], outs[3])):
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_an_expert_that_is_missing_or_of_another_shape(packed: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(packed("llama4"), tmp_path / "source"))
    file = source / "model.safetensors"
    tensors = load_file(file)
    module = "model.layers.1.feed_forward.experts.2.up_proj"
    parts = {name: tensors.pop(name) for name in list(tensors) if name.startswith(module)}
    assert parts
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"experts.*do not make '.*gate_up_proj'"):
        loadstone.plan_finalize(source)
    with pytest.raises(ArtifactError, match=r"experts.*do not make '.*gate_up_proj'"):
        loadstone.plan_export(source, format="fp8")
    smaller = {name: part[: len(part) // 2].contiguous() for name, part in parts.items()}
    save_file(tensors | smaller, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"experts.*do not make '.*gate_up_proj'"):
        loadstone.plan_finalize(source)

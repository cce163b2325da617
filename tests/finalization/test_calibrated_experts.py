"""Calibrated rounding of experts that are stored (in, out): Llama 4's and gpt-oss'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import logits

import loadstone
from loadstone.finalization import calibrate as calibration
from loadstone.finalization import experts
from loadstone.finalization.gptq import gptq
from loadstone.finalization.run import write_plan
from loadstone.quantization.rounding import least_squares_weight

SERVING = {"recipe": "intx4-weight-only", "layout": "compressed-tensors"}
Matrices = list[tuple[torch.Tensor, torch.Tensor]]


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(seed))


def multiplied(module: Any, expert: int, seen: list[tuple[torch.Tensor, ...]]) -> Matrices:
    """An expert's gate, up and down (out, in) with what each is multiplied by, as the module's own code has it."""
    both, last = module.gate_up_proj[expert].detach(), module.down_proj[expert].detach()
    if type(module).__name__ == "Llama4TextExperts":
        x = torch.cat([args[0].view(module.num_experts, -1, args[0].shape[-1])[expert] for args in seen])
        gate, up = both.chunk(2, dim=1)
        between = (x @ up) * module.act_fn(x @ gate)
    else:
        x = torch.cat([args[0][(args[1] == expert).any(-1)] for args in seen])
        gate, up = both[:, ::2], both[:, 1::2]
        between = module._apply_gate(x @ both + module.gate_up_proj_bias[expert])
    assert len(x[x.any(1)]) > 5
    return [(gate.t(), x), (up.t(), x), (last.t(), between.detach())]


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["gpt-oss", "llama4"])
def test_each_matrix_is_rounded_on_its_own_inputs(
    family: str,
    algorithm: str,
    experts_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experts, "FEWEST", 1)
    source = experts_model(family)
    options = {**SERVING, "algorithm": algorithm}
    ready = calibration.calibrate(
        loadstone.plan_finalize(source, calibrate=["unused"], **options), rows(), tmp_path / "out"
    )
    assert not [step.name for step in ready.steps if step.scheme and not step.ready]
    write_plan(ready, tmp_path / "out")
    layer = loadstone.load(tmp_path / "out", device="cpu", dtype="float32").model.layers[0]
    model = loadstone.load(source, device="cpu", dtype="float32")
    name, module = next((n, m) for n, m in model.model.layers[0].named_modules() if n.endswith("experts"))
    seen: list[tuple[torch.Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        for row in rows():
            model(row[None])
    found = layer.get_submodule(name)
    scheme = next(step.scheme for step in ready.steps if step.scheme)
    for expert in range(4):
        stored = multiplied(found, expert, seen)
        for (weight, x), (rounded, _) in zip(multiplied(module, expert, seen), stored, strict=True):
            moment = x.float().t() @ x.float()
            if algorithm == "gptq":
                wanted = gptq([weight.bfloat16()], moment, scheme)[0]  # type: ignore[arg-type]
            else:
                wanted = least_squares_weight(weight.bfloat16(), scheme, moment.diagonal())  # type: ignore[arg-type]
            difference = (wanted.dequantize().float() - rounded).norm() / rounded.norm()
            plain = (weight - rounded).norm() / rounded.norm()
            assert difference < 0.2 * plain, (expert, difference, plain)


@pytest.mark.parametrize("family", ["gpt-oss", "llama4"])
def test_outputs_change_less_and_a_packed_source_is_rounded_likewise(
    family: str, experts_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "FEWEST", 1)
    source = experts_model(family)
    options = {**SERVING, "algorithm": "gptq"}

    def calibrated(source: Path, out: Path) -> Path:
        plan = loadstone.plan_finalize(source, calibrate=["unused"], **options)
        write_plan(calibration.calibrate(plan, rows(1), out), out)
        return out

    loadstone.finalize(source, tmp_path / "plain", **SERVING)
    calibrated(source, tmp_path / "gptq")
    errors = []
    with torch.no_grad():
        expected = loadstone.load(source, device="cpu", dtype="float32")(rows(1)).logits
        for name in ("gptq", "plain"):
            found = loadstone.load(tmp_path / name, device="cpu", dtype="float32")(rows(1)).logits
            errors.append(float((found - expected).square().mean()))
    assert errors[0] < 0.9 * errors[1]
    # 8 bits hold what is rounded again: experts one by one give the tensors that merged ones gave.
    eight = loadstone.finalize(
        source, tmp_path / "eight", recipe="float8-weight-only", layout="compressed-tensors"
    ).out
    merged = loadstone.load(eight, device="cpu")
    merged.save_pretrained(tmp_path / "merged")
    one, two = (calibrated(each, tmp_path / f"{each.name}-out") for each in (eight, tmp_path / "merged"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


@pytest.mark.parametrize("offloaded", [False, True])
def test_inputs_of_llama4s_experts(offloaded: bool, experts_model: Callable[[str], Path]) -> None:
    """They are seen and changed as those of other experts, also where accelerate brings the weights."""
    from loadstone.loading.layer_inputs import InputRanges, change_inputs

    source = experts_model("llama4")
    model = loadstone.load(source, device="cpu")
    names = [n for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n]
    if offloaded:
        from accelerate import cpu_offload

        # Llama 4's rotary embedding does not run under accelerate's hooks.
        for layer in model.model.layers:
            cpu_offload(layer.feed_forward.experts, execution_device=torch.device("cpu"))
    kept = [dict(vars(module)) for module in model.modules()]
    ranges = InputRanges()
    before = logits(model)
    undo = change_inputs(model, {name: lambda x, n=name: ranges.record(n, x) for name in names})
    assert torch.equal(logits(model), before)
    ranges.require(names)
    undo()
    assert [vars(module).keys() for module in model.modules()] == [before.keys() for before in kept]
    undo = change_inputs(model, {names[1]: torch.zeros_like})
    assert not torch.equal(logits(model), before)
    undo()
    assert torch.equal(logits(model), before)

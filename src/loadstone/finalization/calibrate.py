"""Calibrated rounding, one decoder layer at a time: memory holds that layer, its inputs and their statistics.

Each layer is calibrated on the outputs of the rounded layers before it. `gptq` and `smooth` hold the algorithms.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.manifest import versions
from loadstone.artifact.torchao.flatten import torch_dtype
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.experts import FEWEST, plainly, round_experts, use_experts
from loadstone.finalization.gptq import gptq
from loadstone.finalization.journal import calibration_directory, output_in, work_directory
from loadstone.finalization.layers import PLAIN, Call, layer_calls, run_layer
from loadstone.finalization.plan import FinalizePlan, Step
from loadstone.finalization.ranges import measure_inputs, measured_parameters, with_ranges
from loadstone.finalization.smooth import Inputs, awq_scale, find_folds, smooth_scale
from loadstone.quantization.quantize import quantize_scaled, quantize_weight
from loadstone.quantization.rounding import least_squares_weight
from loadstone.quantization.schemes import (
    Int8DynActIntxWeight,
    IntxWeightOnly,
)
from loadstone.ranks import Ranks
from loadstone.writing.publish import check_space

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
_INTX = (IntxWeightOnly, Int8DynActIntxWeight)
# Tokens of one calibration sequence.
_ROW_TOKENS = 512
_SCALES = {"awq": awq_scale, "smoothquant": smooth_scale}


def calibrate(
    plan: FinalizePlan,
    rows: torch.Tensor,
    out: Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> FinalizePlan:
    """Round every calibrated weight on ``rows``, token ids (rows, length); returns the plan with its steps ready.

    Results go beside ``out``, a file for each layer; those that a killed run finished for the same tokens, weights and
    recipe are taken over. ``on_progress(done, total)`` counts layers. Raises `UsageError` when nothing in
    the plan is calibrated, `MissingError` for too little disk space, `ArtifactError` for a model whose layers cannot be
    run one by one or allow no scaling of inputs.
    """
    import torch

    from loadstone.loading import plan as load_plan
    from loadstone.loading.streamed import streamed

    wanted = _wanted(plan)
    if not wanted:
        raise UsageError(
            f"{plan.recipe} rounds nothing by calibration", "Use an intx recipe: intx4-weight-only"
        )
    source = load_plan(plan.source, dtype="float32", trust_remote_code=trust_remote_code)
    folder = _folder(plan, rows, out)
    few: list[str] = []
    with streamed(source, torch.device(device)) as model, torch.no_grad():
        prefix = model.stack_name
        steps = _steps_by_parameter(plan, model.model)
        calibrated_here = {
            step.name for name, found in steps.items() if name.startswith(f"{prefix}.") for step in found
        }
        outside = [step for name, step in wanted.items() if name not in calibrated_here]
        _check_outside(outside, prefix)
        if len(outside) == len(wanted):
            raise UsageError(
                f"no weight that {plan.recipe} quantizes is part of a decoder layer ({prefix})", PLAIN
            )
        needed = plan.bytes_after + sum(s.nbytes for s in wanted.values())
        check_space(needed, out, output_in(work_directory(out)), folder)
        folder.mkdir(parents=True, exist_ok=True)
        hidden, calls = layer_calls(model.model.base_model, model.stack, rows, device)
        for number in range(len(model)):
            start, layer = f"{prefix}.{number}.", model.layer(number)
            found = {n.removeprefix(start): s for n, s in steps.items() if n.startswith(start)}
            inside = {n: s[0] for n, s in found.items() if len(s) == 1 and not s[0].first_row}
            experts = {n: s for n, s in found.items() if n not in inside}
            if any(step.name in wanted for each in found.values() for step in each):
                file = folder / f"{number:05d}.safetensors"
                if not file.is_file():
                    _round_layer(layer, inside, experts, hidden, calls[number], file, device)
                _use_rounded(layer, inside, file, device)
                few += use_experts(layer, experts, file, device)
            hidden = [run_layer(layer, x, calls[number], device) for x in hidden]
            del layer
            if on_progress:
                on_progress(number + 1, len(model))
    if few:
        log.warning(
            "%d matrices of experts saw fewer than %d calibration tokens and are rounded without text; the first: '%s'",
            len(few),
            FEWEST,
            few[0],
        )
    return calibrated(plan, rows, out)


def _steps_by_parameter(plan: FinalizePlan, model: PreTrainedModel) -> dict[str, list[Step]]:
    """The steps of each parameter of the model: one, or of merged experts one for each matrix."""
    from loadstone.loading.meta import destinations

    places = destinations(model, list({step.source.name for step in plan.steps}))
    found: dict[str, list[Step]] = {}
    for step in plan.steps:
        place = places[step.source.name]
        parameter = step.parameter or (place.parameter if place and not place.converted else "")
        if parameter and (step.parameter or parameter not in found):
            found.setdefault(parameter, []).append(step)
    return found


def calibrate_plan(
    plan: FinalizePlan,
    text: str | Path | Sequence[str],
    tokens: int,
    out: Path,
    device: str,
    ranks: Ranks,
    trust_remote_code: bool,
    on_progress: Callable[[int, int], None] | None = None,
) -> FinalizePlan:
    """The plan with its weights rounded, and the ranges of inputs measured, by rank 0 on the first ``tokens`` tokens of
    ``text``; see `calibrate` and `measure_inputs`."""
    rows = calibration_rows(plan, text, tokens, trust_remote_code)
    folder = _folder(plan, rows, out)
    if ranks.rank == 0:
        options: dict[str, Any] = {
            "device": device,
            "trust_remote_code": trust_remote_code,
            "on_progress": on_progress,
        }
        measure_inputs(plan, rows, folder, **options)
        if _wanted(plan) or not measured_parameters(plan):
            calibrate(plan, rows, out, **options)
    ranks.wait()
    return with_ranges(calibrated(plan, rows, out), folder)


def calibration_rows(
    plan: FinalizePlan, text: str | Path | Sequence[str], tokens: int, trust_remote_code: bool = False
) -> torch.Tensor:
    """Token ids (rows, length), at most 512 a row, of the first ``tokens`` tokens of ``text``, in order.

    ``text``: a file or data set as `read_corpus` takes it, or documents. Raises `UsageError` for too little text.
    """
    import torch

    from loadstone.loading.loader import load_tokenizer, using
    from loadstone.loading.model_class import load_config
    from loadstone.loading.positions import positions
    from loadstone.text.corpus import read_corpus
    from loadstone.text.tokenizing import require_known

    tokenizer = load_tokenizer(plan.source, trust_remote_code=trust_remote_code)
    length = min(_ROW_TOKENS, positions(load_config(plan.source, trust_remote_code)).limit or _ROW_TOKENS)
    documents = read_corpus(str(text)).documents if isinstance(text, str | Path) else text
    ids: list[int] = []
    for document in documents:
        with using(tokenizer):
            ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // length
    if count == 0:
        name = f"'{text}'" if isinstance(text, str | Path) else "the calibration text"
        raise UsageError(
            f"{name} gives {min(len(ids), tokens)} calibration tokens", f"At least {length} are needed"
        )
    rows = torch.tensor(ids[: count * length]).view(count, length)
    known = (plan.config | (plan.config.get("text_config") or {})).get("vocab_size")
    if isinstance(known, int):
        require_known(int(rows.max()), known, tokenizer, str(plan.source.root))
    return rows


def calibrated(plan: FinalizePlan, rows: torch.Tensor, out: Path) -> FinalizePlan:
    """The plan with the results of a finished `calibrate` beside ``out``, on any rank."""
    from safetensors import safe_open

    ready: dict[str, str] = {}
    folder = _folder(plan, rows, out)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as parts:
            ready |= dict.fromkeys(parts.keys(), str(file))
    shards = tuple(tuple(_with_result(s, ready) for s in shard) for shard in plan.shards)
    return replace(plan, shards=shards, calibration=folder.name)


def _with_result(step: Step, ready: dict[str, str]) -> Step:
    """The step with its calibrated tensors, or rounded without text if it is outside of the decoder layers."""
    file = ready.get(step.outputs[0].name, "")
    if not file and step.encoding and step.encoding.scheme.calibrated:
        return replace(plainly(step), reason=f"{step.reason}, rounded without text")
    return replace(step, ready=file)


def _check_outside(outside: list[Step], prefix: str) -> None:
    """Warn about weights that are not in a decoder layer; raise `UsageError` for those that need text."""
    for step in outside:
        if step.encoding and step.encoding.scales_inputs:
            raise UsageError(
                f"'{step.name}' is not in a decoder layer ({prefix}): it cannot be calibrated",
                "Give it the rule `skip`, or rounding=affine, in a recipe file",
            )
    if outside:
        log.warning(
            "%d weights outside of the decoder layers (%s) are rounded without calibration, the first is '%s'",
            len(outside),
            prefix,
            outside[0].name,
        )


def _wanted(plan: FinalizePlan) -> dict[str, Step]:
    return {s.name: s for s in plan.steps if s.scheme and s.scheme.calibrated}


def _round_layer(
    layer: torch.nn.Module,
    inside: dict[str, Step],
    experts: dict[str, list[Step]],
    hidden: list[torch.Tensor],
    call: Call,
    file: Path,
    device: str,
) -> None:
    """Write a layer's rounded Linears and experts, and its other parameters that a scale was folded into."""
    from safetensors.torch import save_file

    wanted = {
        name.removesuffix(".weight"): step
        for name, step in inside.items()
        if step.scheme and step.scheme.calibrated
    }
    inputs = _input_statistics(layer, wanted, hidden, call, device)
    for name, step in wanted.items():
        if name not in inputs:
            raise ArtifactError(
                f"the calibration text never reaches '{step.name}'", "Use more text, or skip it"
            )
    rounded = {f"{name}.weight" for name in wanted}
    before = {
        name: p.detach().clone()
        for name, p in layer.named_parameters()
        if name not in rounded and name not in experts
    }
    parts = round_experts(layer, experts, hidden, call, device)
    scales = _fold_scales(layer, wanted, inputs, lambda: run_layer(layer, hidden[0], call, device))
    for name, step in wanted.items():
        assert step.encoding is not None and step.scheme is not None
        weight, algorithm = _weight(layer, name, step), step.scheme.algorithm
        if algorithm == "gptq":
            moment = inputs[name].moment
            assert moment is not None
            tensor = gptq(weight, moment, step.scheme)  # type: ignore[arg-type]
        elif step.encoding.scales_inputs:
            scale = _SCALES[algorithm](inputs[name], [(weight, step.scheme)])
            tensor = quantize_scaled(weight, step.scheme, scale)
        elif (
            algorithm == "awq"
            and isinstance(step.scheme, _INTX)
            and (moment := inputs[name].moment) is not None
        ):
            # The paper's clipping: each group's range is what changes the outputs least.
            matters = moment.diagonal() / scales[name].square() if name in scales else moment.diagonal()
            tensor = least_squares_weight(weight, step.scheme, matters)
        else:
            tensor = quantize_weight(weight, step.scheme)
        parts |= {n: p.cpu().contiguous() for n, p in step.encoding.store(tensor).items()}
    for name, old in before.items():
        new = layer.get_parameter(name)
        if not new.equal(old):
            output = inside[name].outputs[0]
            parts[output.name] = new.detach().to("cpu", torch_dtype(output.dtype)).contiguous()
    partial = file.with_suffix(f".{os.getpid()}.partial")
    save_file(parts, partial)
    partial.replace(file)


def _weight(layer: torch.nn.Module, name: str, step: Step) -> torch.Tensor:
    """A Linear's weight in the dtype that it is quantized in."""
    weight: Any = layer.get_submodule(name).weight
    assert step.encoding is not None
    return weight.detach().to(torch_dtype(step.encoding.dtype))


def _fold_scales(
    layer: torch.nn.Module,
    wanted: dict[str, Step],
    inputs: dict[str, Inputs],
    run: Callable[[], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Scale the columns of Linears whose tensors cannot scale their inputs, and fold that; returns scales by Linear."""
    names = [
        name
        for name, step in wanted.items()
        if step.scheme
        and step.scheme.algorithm in _SCALES
        and not (step.encoding and step.encoding.scales_inputs)
    ]
    chosen = []
    for fold in find_folds(layer, names, run, list(wanted)) if names else []:
        members = [(_weight(layer, name, wanted[name]), wanted[name].scheme) for name in fold.linears]
        algorithms = {scheme.algorithm for _, scheme in members if scheme}
        if len(algorithms) == 1:
            scale = _SCALES[algorithms.pop()](inputs[fold.linears[0]], members, fold.repeat)  # type: ignore[arg-type]
            chosen.append((fold, scale))
    if names and not chosen:
        raise ArtifactError(
            f"no norm or Linear of {type(layer).__name__} can take over a scale of its inputs, and the tensors of "
            f"'{wanted[names[0]].scheme}' hold none",
            "Use --algorithm gptq",
        )
    # All scales are chosen on the weights as they came.
    for fold, scale in chosen:
        fold.apply(layer, scale)
    return {name: scale for fold, scale in chosen for name in fold.linears}


def _input_statistics(
    layer: torch.nn.Module,
    wanted: dict[str, Step],
    hidden: list[torch.Tensor],
    call: Call,
    device: str,
) -> dict[str, Inputs]:
    """Statistics of the inputs of each named Linear; Linears that share an input share them."""
    found: dict[str, Inputs] = {}
    seen: list[tuple[torch.Tensor, str]] = []
    moments = any(s.scheme and s.scheme.algorithm != "smoothquant" for s in wanted.values())

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            owner = next((other for tensor, other in seen if tensor is x), None)
            if owner is not None:
                found[name] = found[owner]
                return
            seen.append((x, name))
            if name in found:
                found[name].add(Inputs.of(x, moments))
            else:
                found[name] = Inputs.of(x, moments)

        return hook

    handles = [layer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in wanted]
    for x in hidden:
        seen.clear()
        run_layer(layer, x, call, device)
    for handle in handles:
        handle.remove()
    return found


def _use_rounded(layer: torch.nn.Module, inside: dict[str, Step], file: Path, device: str) -> None:
    """Load the rounded weights into the layer, so that later layers are calibrated on its real outputs."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as parts:
        stored = set(parts.keys())
        for name, step in inside.items():
            if step.outputs[0].name not in stored:
                continue
            tensors = {output.name: parts.get_tensor(output.name).to(device) for output in step.outputs}
            value = step.encoding.dequantize(tensors) if step.encoding else tensors[step.name]
            parameter = layer.get_parameter(name)
            parameter.data = value.to(parameter.dtype)


def _folder(plan: FinalizePlan, rows: torch.Tensor, out: Path) -> Path:
    """A place for this calibration: other tokens, weights, recipes or versions never share files."""
    names = [step.name for step in plan.steps if step.scheme]
    text = json.dumps(
        [plan.kind, str(plan.recipe), names, plan.dtype, plan.source.stamp, list(rows.shape), versions()]
    )
    digest = hashlib.sha256(text.encode() + rows.numpy().tobytes()).hexdigest()
    return calibration_directory(out) / digest[:16]

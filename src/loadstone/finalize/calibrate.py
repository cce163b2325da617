"""Calibrated rounding (GPTQ), one decoder layer at a time: in memory are that layer, its inputs and its Hessians.

GPTQ (https://arxiv.org/abs/2210.17323) rounds a weight column by column and moves each column's error onto the columns
not yet rounded, as the inputs' second moments say. torchao's own prototype needs a GPU and covers other tensor classes;
here the result is other integers and scales in the class that plain rounding gives, so it loads everywhere alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalize.plan import QUANTIZE, FinalizePlan, Step
from loadstone.finalize.read import SourceReader
from loadstone.quantization.schemes import Int8DynActIntxWeight, IntxWeightOnly

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Damping of the Hessian's diagonal, as a share of its mean: the paper's.
_DAMP = 0.01
# Columns whose errors are gathered before they are applied to the rest of the matrix.
_COLUMNS = 128


def calibrate(
    plan: FinalizePlan,
    rows: torch.Tensor,
    work: Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> FinalizePlan:
    """The plan with every ``rounding=gptq`` step made ready from ``rows``, token ids (rows, length).

    Results go to ``work``, a file for each layer; those that a killed run finished for the same tokens, weights and
    recipe are taken over. ``on_progress`` is told of each finished layer. Raises `UsageError` when nothing in the plan
    is calibrated, `ArtifactError` for a model whose layers cannot be run one by one.
    """
    import torch

    from loadstone.loading.meta import destinations

    wanted = {
        s.name: s for s in plan.steps if s.action == QUANTIZE and getattr(s.scheme, "rounding", "") == "gptq"
    }
    if not wanted:
        raise UsageError(
            f"{plan.recipe} rounds nothing by calibration", "Use an intx recipe: intx4-weight-only"
        )
    model = _empty_model(plan.source, trust_remote_code)
    prefix, layers = _layer_stack(model)
    outside = [name for name in wanted if not name.startswith(f"{prefix}.")]
    if outside:
        raise UsageError(
            f"'{outside[0]}' lies in no decoder layer: it cannot be calibrated",
            "Give it rounding=affine or mse",
        )
    sources = {}
    stored = {s.source.name: s.source for s in plan.steps}
    for key, place in destinations(model, list(stored)).items():
        if place is not None and not place.converted:
            sources[place.parameter] = stored[key]
    reader = SourceReader(plan.source)
    folder = work / _job(plan, rows)
    folder.mkdir(parents=True, exist_ok=True)
    ready: dict[str, str] = {}
    with torch.inference_mode(False), torch.no_grad():
        hidden, calls = _inputs(model, prefix, layers, rows, sources, reader, device)
        for number, layer in enumerate(layers):
            steps = {
                s.name.removeprefix(f"{prefix}.{number}.").removesuffix(".weight"): s
                for s in wanted.values()
                if s.name.startswith(f"{prefix}.{number}.")
            }
            _fill(layer, f"{prefix}.{number}.", sources, reader, device)
            file = folder / f"{number:05d}.safetensors"
            if steps:
                if not file.is_file():
                    _round_layer(layer, steps, hidden, calls[number], reader, file, device)
                _use_rounded(layer, steps, file, device)
                ready |= {s.name: str(file) for s in steps.values()}
            hidden = [_run(layer, x, calls[number], device) for x in hidden]
            layer.to("meta")
            if on_progress:
                on_progress(1)
    shards = tuple(tuple(replace(s, ready=ready.get(s.name, "")) for s in shard) for shard in plan.shards)
    return replace(plan, shards=shards)


def discard(work: Path) -> None:
    """Remove the calibration's files, once the artifact is written."""
    shutil.rmtree(work, ignore_errors=True)


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: Int8DynActIntxWeight | IntxWeightOnly
) -> torch.Tensor:
    """torchao's tensor for ``weight`` (out, in), rounded so that its product with inputs of second moment ``hessian``
    (in, in) changes least."""
    import torch

    from loadstone.quantization.rounding import intx_tensor, least_squares_scales

    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    rest = weight.float().clone()
    group = scheme.group_size or weight.shape[1]
    diagonal = hessian.diagonal().clone()
    inverse = _inverse_factor(hessian)
    one_group = replace(scheme, group_size=0)
    values = torch.empty_like(weight, dtype=torch.int8)
    scales, zeros = [], []
    if group == weight.shape[1]:
        found = least_squares_scales(weight, one_group, diagonal)
    for start in range(0, weight.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, weight.shape[1])
        errors = torch.zeros_like(rest[:, start:end])
        for column in range(start, end):
            if group < weight.shape[1] and column % group == 0:
                # The group's scale is chosen once the errors of earlier columns have reached it.
                last = min(column + group, end)
                late = rest[:, column : column + group].clone()
                if last < column + group:
                    late[:, last - column :] -= errors @ inverse[start:end, last : column + group]
                found = least_squares_scales(
                    late.to(weight.dtype), one_group, diagonal[column : column + group]
                )
            if column % group == 0:
                scales.append(found[0])
                zeros.append(found[1])
            scale, zero = found[0].float()[:, 0], found[1].float()[:, 0]
            rounded = (rest[:, column] / scale + zero).round().clamp(low, high)
            values[:, column] = rounded.to(torch.int8)
            # As the tensor dequantizes: in the weight's own dtype.
            back = ((rounded - zero) * scale).to(weight.dtype).float()
            error = (rest[:, column] - back) / inverse[column, column]
            rest[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    return intx_tensor(values, torch.cat(scales, 1), torch.cat(zeros, 1), scheme)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    import torch

    damped = hessian.double().clone()
    dead = damped.diagonal() == 0
    damped.diagonal()[dead] = 1
    mean = damped.diagonal().mean()
    for attempt in range(6):
        damped.diagonal().add_(_DAMP * mean * 10**attempt)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper.float()
    raise ArtifactError(
        "the calibration text gives a Hessian that cannot be inverted", "Use more or other text"
    )


def _round_layer(
    layer: torch.nn.Module,
    steps: dict[str, Step],
    hidden: list[torch.Tensor],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    reader: SourceReader,
    file: Path,
    device: str,
) -> None:
    from safetensors.torch import save_file

    from loadstone.quantization.flatten import flatten

    hessians = _hessians(layer, list(steps), hidden, call, device)
    parts: dict[str, torch.Tensor] = {}
    for name, step in steps.items():
        assert isinstance(step.scheme, Int8DynActIntxWeight | IntxWeightOnly)
        if name not in hessians:
            raise ArtifactError(
                f"the calibration text never reaches '{step.name}'", "Use more text, or skip it"
            )
        weight = reader.read(step.source).to(device=device, dtype=_weight_dtype(step))
        _, made = flatten(step.name, gptq(weight, hessians[name], step.scheme))
        parts |= {o.name: p.cpu().contiguous() for o, p in zip(step.outputs, made.values(), strict=True)}
    partial = file.with_suffix(f".{os.getpid()}.partial")
    save_file(parts, partial)
    partial.replace(file)


def _hessians(
    layer: torch.nn.Module,
    names: list[str],
    hidden: list[torch.Tensor],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    device: str,
) -> dict[str, torch.Tensor]:
    """Second moments of the inputs of each named Linear; Linears that share an input share the matrix."""
    found: dict[str, torch.Tensor] = {}
    seen: list[tuple[torch.Tensor, str]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            owner = next((other for tensor, other in seen if tensor is x), None)
            if owner is not None:
                found[name] = found[owner]
                return
            seen.append((x, name))
            flat = x.reshape(-1, x.shape[-1]).float()
            moment = flat.t() @ flat
            found[name] = found[name].add_(moment) if name in found else moment

        return hook

    handles = [layer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    for x in hidden:
        seen.clear()
        _run(layer, x, call, device)
    for handle in handles:
        handle.remove()
    return found


def _use_rounded(layer: torch.nn.Module, steps: dict[str, Step], file: Path, device: str) -> None:
    """Give the layer the weights it will have, so that later layers are calibrated on what they will see."""
    from safetensors import safe_open

    from loadstone.quantization.rounding import intx_tensor

    with safe_open(file, framework="pt") as parts:
        for name, step in steps.items():
            assert isinstance(step.scheme, Int8DynActIntxWeight | IntxWeightOnly)
            values, scale, zero = (parts.get_tensor(o.name) for o in step.outputs)
            weight: Any = layer.get_submodule(name).weight
            weight.data = intx_tensor(values, scale, zero, step.scheme).dequantize().to(device, weight.dtype)


def _inputs(
    model: PreTrainedModel,
    prefix: str,
    layers: torch.nn.ModuleList,
    rows: torch.Tensor,
    sources: dict[str, Any],
    reader: SourceReader,
    device: str,
) -> tuple[list[torch.Tensor], list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What enters the first layer for each row, and how the model calls each layer (masks, positions).

    Every layer is replaced by one that notes its call and passes its input on: all calls without any layer's weights.
    """
    base = model.base_model
    head = (
        {id(p) for p in model.get_output_embeddings().parameters()}
        if model.get_output_embeddings()
        else set()
    )
    inner = {id(p) for p in layers.parameters()}
    for name, parameter in list(base.named_parameters(prefix=model.base_model_prefix)):
        table = model.get_input_embeddings().weight is parameter
        if id(parameter) not in inner and (id(parameter) not in head or table):
            _set(model, name, sources, reader, device)
    for buffer_owner in base.modules():
        for name, buffer in list(buffer_owner.named_buffers(recurse=False)):
            buffer_owner._buffers[name] = buffer.to(device)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entered: list[torch.Tensor] = []

    def note(number: int) -> Callable[..., Any]:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if number == 0:
                entered.append(x.cpu())
            if number == len(calls):
                calls.append((args, kwargs))
            return x

        return forward

    for number, layer in enumerate(layers):
        layer.forward = note(number)  # type: ignore[method-assign]
    try:
        for row in rows:
            base(input_ids=row[None].to(device), use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    if len(calls) != len(layers):
        raise ArtifactError(f"{type(model).__name__} does not run its layers one after the other", _PLAIN)
    return entered, calls


def _run(
    layer: torch.nn.Module, x: torch.Tensor, call: tuple[tuple[Any, ...], dict[str, Any]], device: str
) -> torch.Tensor:
    result = layer(x.to(device), *call[0], **call[1])
    return (result[0] if isinstance(result, tuple) else result).cpu()


def _fill(
    layer: torch.nn.Module, prefix: str, sources: dict[str, Any], reader: SourceReader, device: str
) -> None:
    for name, _ in list(layer.named_parameters()):
        _set(layer, name, sources, reader, device, prefix)


def _set(
    root: torch.nn.Module,
    name: str,
    sources: dict[str, Any],
    reader: SourceReader,
    device: str,
    prefix: str = "",
) -> None:
    """Read one parameter, in float32: calibration computes there, on CPUs as fast as can be."""
    import torch

    full = prefix + name
    if full not in sources:
        raise ArtifactError(
            f"'{full}' is merged from several tensors: the model cannot be calibrated", _PLAIN
        )
    owner, _, last = name.rpartition(".")
    module = root.get_submodule(owner)
    value = reader.read(sources[full]).to(device=device, dtype=torch.float32)
    module._parameters[last] = torch.nn.Parameter(value, requires_grad=False)


def _layer_stack(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] in ("layers", "h", "blocks"):
            return name, module
    raise ArtifactError(f"{type(model).__name__} has no list of decoder layers", _PLAIN)


def _empty_model(artifact: Artifact, trust_remote_code: bool) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers (rotary frequencies), which no file holds."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    from loadstone.loading.native import load_config, model_class_of

    config = load_config(artifact, trust_remote_code)
    with init_empty_weights(include_buffers=False), no_init_weights():
        return model_class_of(config, artifact)(config).eval()


def _weight_dtype(step: Step) -> torch.dtype:
    attributes = json.loads(step.metadata)["_data"]
    import torch

    return getattr(torch, attributes["dtype"]["_data"])


def _job(plan: FinalizePlan, rows: torch.Tensor) -> str:
    """A name for this calibration: other tokens, weights or recipes never share files."""
    files = plan.source.dcp.files if plan.source.dcp else plan.source.weights.files
    stats = [(f, (s := (plan.source.path / f).stat()).st_size, s.st_mtime_ns) for f in files]
    text = json.dumps([str(plan.recipe), plan.dtype, stats, list(rows.shape)])
    return hashlib.sha256(text.encode() + rows.numpy().tobytes()).hexdigest()[:16]


_PLAIN = "Use a rounding that needs no text: affine, mse or hqq"

"""`finalize --verify`: read an output by the rules of safetensors, transformers and torchao, and hold it to its source.

Nothing that writes is asked, so that the two can disagree:

- transformers loads the output with its values on the meta device; a name that it misses, does not know or finds in
  another shape is an error. (The compressed-tensors layout, for which transformers needs another package, is held to
  the model by the rules of `loading`.)
- A plain tensor is the source's, cast to the output's dtype, in every bit.
- A torchao tensor, put together by torchao from the parts in the file, is what torchao's own `quantize_` makes of the
  source's weight by the config in the output's config.json: the same class, attributes and bits.
- Where torchao has no such rounding (mse, calibrated weights), no row of the weight that a load computes with is
  further from the source's than `_FARTHER` times what torchao's plain rounding is. Where a scale of the inputs was
  folded into other weights (AWQ, SmoothQuant), that holds up to one factor a row and one a column.
- In the compressed-tensors layout the weight that a load computes with is what torchao's tensor stands for, up to one
  rounding to the model's dtype. FP8 in squares, which torchao does not have, is off by half a step at most.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from loadstone.artifact import Artifact, TensorInfo, detect
from loadstone.artifact.packed import Packed
from loadstone.artifact.source import SafetensorsSource
from loadstone.artifact.torchao.flatten import torch_dtype
from loadstone.errors import ArtifactError
from loadstone.finalization.moving import MovedEncoding
from loadstone.finalization.plan import FinalizePlan, Step
from loadstone.quantization.quantize import dense
from loadstone.quantization.schemes import Float8Blocks, Scheme
from loadstone.quantization.serving import layer_scheme
from loadstone.quantization.torchao_config import to_torchao

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# How many times as far from the source as by plain rounding a row may be: gptq moves errors between columns. On
# SmolLM2 the farthest row is 3.0 times as far with gptq and 2.6 with smoothquant.
_FARTHER = {"mse": 1.01, "shared scale": 1.5, "gptq": 6.0, "awq": 6.0, "smoothquant": 6.0}
# Relative rounding of two products and a scale in the model's dtype, of 8 significant bits at least.
_ONE_ROUNDING = 2.0**-6
_AGAIN = "Finalize again; if it happens again, please report it"


def verify(
    plan: FinalizePlan,
    out: Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Hold the output in ``out`` to the source of ``plan``, tensor by tensor; returns the stored tensors compared.

    ``device``: where the weights were quantized. Raises `ArtifactError` naming the first tensor that is not right.
    """
    import torch

    artifact = detect(out)
    with _stored(out) as stored, torch.inference_mode(False), torch.no_grad():
        _check_plan(plan, artifact, stored)
        check = _checker(plan, artifact, stored, device, trust_remote_code)
        for step in plan.steps:
            check(step)
            if on_progress:
                on_progress(step.source_bytes)
    return sum(len(step.outputs) for step in plan.steps)


@dataclass(frozen=True)
class _Stored:
    """The tensors of a directory as safetensors' own reader gives them. ``metadata``: of all headers, as transformers
    merges them."""

    handles: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, str] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.handles[name].get_tensor(name)
        return tensor

    def wrong(self, name: str, what: str) -> NoReturn:
        raise ArtifactError(f"{self.files[name]}: tensor '{name}' {what}", _AGAIN)


@contextmanager
def _stored(out: Path) -> Iterator[_Stored]:
    """The tensors in the files that transformers would open: those that the index names, or the only one."""
    from safetensors import safe_open

    index = out / "model.safetensors.index.json"
    listed: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    handles: dict[str, Any] = {}
    files: dict[str, str] = {}
    metadata: dict[str, str] = {}
    with ExitStack() as stack:
        for file in sorted(set(listed.values())) or ["model.safetensors"]:
            handle = stack.enter_context(safe_open(out / file, framework="pt"))
            metadata |= handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118 (a safe_open handle is not a mapping)
                handles[name], files[name] = handle, file
        yield _Stored(handles, files, metadata)


def _check_plan(plan: FinalizePlan, artifact: Artifact, stored: _Stored) -> None:
    """Raise `ArtifactError` for a config or names of tensors that are not those of the plan."""
    if artifact.config != json.loads(json.dumps(plan.config)):
        raise ArtifactError("config.json is not that of the plan", _AGAIN)
    planned = {output.name for step in plan.steps for output in step.outputs}
    for name in sorted(stored.files.keys() - planned):
        stored.wrong(name, "is not part of the plan")
    for name in sorted(planned - stored.files.keys()):
        raise ArtifactError(f"tensor '{name}' is missing from the output", _AGAIN)


def _checker(
    plan: FinalizePlan, artifact: Artifact, stored: _Stored, device: str, trust_remote_code: bool
) -> Callable[[Step], None]:
    """What checks one step of the plan; the names are checked here, as a load would."""
    weights = _Weights(plan, trust_remote_code)
    if plan.kind == "compressed-tensors":
        from loadstone.loading.decoded import dense_view
        from loadstone.loading.meta import model_map

        view = dense_view(artifact)
        model_map(view, view.tensors, trust_remote_code)
        return lambda step: _check_packed(step, stored, artifact.packed, weights, device)
    model = _load_without_values(artifact, plan.source, trust_remote_code)
    return lambda step: _check_torchao(step, stored, model, weights, device)


def _load_without_values(artifact: Artifact, source: Artifact, trust_remote_code: bool) -> PreTrainedModel:
    """The output's model as transformers loads it, with its quantizer and every value on the meta device.

    Raises `ArtifactError` where transformers fails, or reports what it does not report of the source.
    """
    from loadstone.loading.model_class import BUILDING, load_config, model_class_of, quiet_transformers
    from loadstone.loading.offline import offline

    def load(each: Artifact) -> tuple[PreTrainedModel, dict[str, Any]]:
        found = model_class_of(load_config(each, trust_remote_code), each, trust_remote_code)
        with BUILDING, quiet_transformers(), offline(), warnings.catch_warnings():
            # torchao's, of `_default` in configs that name modules, as finalize writes them.
            warnings.simplefilter("ignore")
            return found.from_pretrained(  # type: ignore[no-any-return]
                each.path,
                dtype="auto",
                device_map={"": "meta"},
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )

    try:
        model, info = load(artifact)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(f"the output: transformers cannot load it ({reason})", _AGAIN) from error
    left = {what: set(info[what]) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(left.values()) and source.adapter is None and not source.decoded:
        _, before = load(source)
        left = {what: names - set(before[what]) for what, names in left.items()}
    for what, names in left.items():
        for name in sorted(names, key=str):
            said = what.removesuffix("_keys")
            raise ArtifactError(f"the output: transformers reports tensor '{name}' as {said}", _AGAIN)
    return model


class _Weights:
    """The source's values: by safetensors' own reader where the source is safetensors, experts merged by transformers'
    own conversion."""

    def __init__(self, plan: FinalizePlan, trust_remote_code: bool) -> None:
        self._source = plan.source
        self._trust = trust_remote_code
        self._model: PreTrainedModel | None = None

    def of(self, step: Step) -> torch.Tensor:
        """The whole weight that a step's stored tensors stand for, as it is stored in the source."""
        if isinstance(step.encoding, MovedEncoding):
            return self._moved(step.encoding)
        if len(step.sources) == 1:
            return self._read(step.source)
        from loadstone.loading.complete import convert, converters_of
        from loadstone.loading.meta import destinations, meta_model

        if self._model is None:
            self._model = meta_model(self._source, self._trust)
        places = destinations(self._model, [info.name for info in step.sources])
        parts = {info.name: self._read(info) for info in step.sources}
        return convert(self._model, converters_of(self._model), step.name, parts, places)[step.name]

    def _read(self, info: TensorInfo) -> torch.Tensor:
        source = self._source.source
        if isinstance(source, SafetensorsSource) and source.tensors.get(info.name) == info:
            from safetensors import safe_open

            with safe_open(source.directory / info.file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(info.name)
                return tensor
        return source.read(info)

    def _moved(self, encoding: MovedEncoding) -> torch.Tensor:
        from loadstone.loading.rebuild import rebuild

        source = self._source.source
        flat = next(each for each in self._source.quantized.values() if each.parts == encoding.parts)
        described = source.describe(flat.name)
        whole = dense(rebuild(described, {key: source.read(info) for key, info in flat.parts.items()}))
        rows, columns = encoding.shape
        return whole.reshape(-1, columns)[encoding.first : encoding.first + rows]


def _check_plain(step: Step, stored: _Stored, weights: _Weights) -> None:
    (output,) = step.outputs
    found, expected = stored.read(output.name), _calibrated(step, output.name)
    if expected is None:
        expected = weights.of(step).to(torch_dtype(output.dtype))
    if not _same_bits(found, expected):
        stored.wrong(output.name, "has other values than the source")


def _calibrated(step: Step, name: str) -> torch.Tensor | None:
    """What calibration stored for a tensor; None where it left that alone."""
    if not step.ready:
        return None
    from safetensors import safe_open

    with safe_open(step.ready, framework="pt") as file:
        tensor: torch.Tensor | None = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
        return tensor


def _check_torchao(
    step: Step, stored: _Stored, model: PreTrainedModel, weights: _Weights, device: str
) -> None:
    if step.encoding is None:
        return _check_plain(step, stored, weights)
    from torchao.prototype.safetensors.safetensors_support import (
        flatten_tensor_state_dict,
        unflatten_tensor_state_dict,
    )

    name, first = step.name, step.outputs[0].name
    parts = {output.name: stored.read(output.name) for output in step.outputs}
    _check_calibrated(step, parts, stored)
    about = {name: stored.metadata[name], "tensor_names": json.dumps([name])}
    rebuilt, left = unflatten_tensor_state_dict({k: part.to(device) for k, part in parts.items()}, about)
    if left or name not in rebuilt:
        stored.wrong(first, "and its other parts are not what the header says they are")
    weight = weights.of(step).to(device, torch_dtype(step.encoding.dtype))
    quantize = partial(_quantized, name, model)
    if step.ready or step.encoding.scheme.algorithm in _FARTHER:
        return _check_near(step, dense(rebuilt[name]), weight, quantize, stored)
    expected = quantize(weight)
    want, described = flatten_tensor_state_dict({name: expected})
    if json.loads(described[name]) != json.loads(about[name]):
        stored.wrong(
            first, f"is described as {about[name]:.200}, and torchao describes it as {described[name]:.200}"
        )
    for part, value in want.items():
        if not _same_bits(parts[part], value.cpu()) and not _rows_of_zeros(rebuilt[name], expected):
            stored.wrong(part, "differs from what torchao makes of its source")


def _quantized(name: str, model: PreTrainedModel, weight: torch.Tensor) -> torch.Tensor:
    """The weight as torchao quantizes it by the config in the output's config.json, as transformers reads that."""
    import torch
    from torchao.quantization import FqnToConfig, quantize_

    owner, _, last = name.rpartition(".")
    module = copy.copy(model.get_submodule(owner))
    # Without the others, which may be quantized already.
    module._parameters = dict.fromkeys(module._parameters) | {
        last: torch.nn.Parameter(weight, requires_grad=False)
    }
    root = inner = torch.nn.Module()
    *above, own = owner.split(".")
    for each in above:
        inner.add_module(each, torch.nn.Module())
        inner = inner.get_submodule(each)
    inner.add_module(own, module)
    config = model.hf_quantizer.quantization_config.get_apply_tensor_subclass()
    # torchao refuses a filter beside a config that names modules.
    quantize_(root, config, **({"filter_fn": None} if isinstance(config, FqnToConfig) else {}))
    return root.get_parameter(name).detach()


def _rows_of_zeros(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they differ only where torchao divides rows of zeros by a scale of zero, which gives NaN: zeros here."""
    import torch

    scale = getattr(expected, "scale", None)
    if scale is None or not bool((scale == 0).any()):
        return False
    return torch.equal(dense(found), dense(expected).nan_to_num(nan=0.0))


def _check_packed(
    step: Step, stored: _Stored, packed: Mapping[str, Packed], weights: _Weights, device: str
) -> None:
    if step.encoding is None:
        return _check_plain(step, stored, weights)
    from loadstone.loading.packed import LazyPacked

    name, scheme, first = step.name, step.encoding.scheme, step.outputs[0].name
    parts = {output.name: stored.read(output.name) for output in step.outputs}
    _check_calibrated(step, parts, stored)
    found = packed.get(name)
    if found is None or found.scheme != layer_scheme(scheme):
        stored.wrong(
            first, f"is {found.scheme if found else 'plain'} by config.json, not {layer_scheme(scheme)}"
        )
    by_suffix = {suffix: parts[info.name] for suffix, info in found.parts.items()}
    dtype = torch_dtype(step.encoding.dtype)
    got = LazyPacked(found, by_suffix).to(device, dtype)
    weight = weights.of(step).to(device, dtype)
    rounding = scheme.weight_only
    if isinstance(rounding, Float8Blocks):
        # Half a step of e4m3, of a value with 3 bits after the first and of one below the smallest such value.
        largest = weight.abs().amax().float()
        return _check_close(
            step, got, weight, stored, relative=2.0**-4 + 2.0**-8, absolute=largest / 448 * 2.0**-9
        )
    if step.encoding.moves:
        return _check_close(step, got, weight, stored)
    quantize = partial(_quantized_alone, rounding)
    if step.ready or rounding.algorithm in _FARTHER or step.merged_with:
        return _check_near(step, got, weight, quantize, stored)
    _check_close(step, got, dense(quantize(weight)), stored)


def _quantized_alone(scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) as torchao quantizes a Linear's by the config of ``scheme``."""
    import torch
    from torchao.quantization import quantize_

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(linear, to_torchao(scheme))
    return linear.weight.detach()


def _check_calibrated(step: Step, parts: Mapping[str, torch.Tensor], stored: _Stored) -> None:
    for name, part in parts.items():
        made = _calibrated(step, name)
        if made is not None and not _same_bits(part, made):
            stored.wrong(name, "differs from what calibration made")


def _check_close(
    step: Step,
    got: torch.Tensor,
    want: torch.Tensor,
    stored: _Stored,
    *,
    relative: float = _ONE_ROUNDING,
    absolute: float | torch.Tensor = 0.0,
) -> None:
    want = want.float().nan_to_num(nan=0.0)
    if not bool(((got.float() - want).abs() <= relative * want.abs() + absolute).all()):
        stored.wrong(
            step.outputs[0].name, "and its other parts stand for other values than the source's, rounded"
        )


def _check_near(
    step: Step,
    got: torch.Tensor,
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], torch.Tensor],
    stored: _Stored,
) -> None:
    """``got``: the weight that a load computes with; ``quantize``: torchao's plain rounding."""
    assert step.scheme is not None
    algorithm, got, want = step.scheme.algorithm, got.float(), weight.float()
    if algorithm in ("awq", "smoothquant") and not step.scheme.scales_inputs:
        for dim in (0, 1):
            want = want * ((got * want).sum(dim, True) / want.square().sum(dim, True).clamp(min=1e-30))
    plain = dense(quantize(want.to(weight.dtype))).float().nan_to_num(nan=0.0)
    errors, plain_errors = (each.sub(want).norm(dim=-1) for each in (got, plain))
    if step.packed:
        # Values that were rounded before may be exact by plain rounding: then uniform errors of its steps are no fault.
        steps = 2 * want.abs().amax(-1) / (2**step.scheme.nominal_bits - 1)
        plain_errors = plain_errors.maximum(steps * (want.shape[-1] / 12) ** 0.5)
    factor = _FARTHER.get(algorithm, _FARTHER["shared scale"])
    far = errors > factor * plain_errors + _ONE_ROUNDING * want.norm(dim=-1)
    if bool(far.any()):
        row = int(far.reshape(-1).nonzero()[0])
        stored.wrong(
            step.outputs[0].name, f"and its other parts are far from the source's values in row {row}"
        )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not one.numel():
        return True
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))

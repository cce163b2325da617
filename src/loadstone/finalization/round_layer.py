"""The calibrated rounding of one decoder layer: statistics of its inputs over all ranks, then each rank rounds some of
its Linears and experts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadstone.artifact.torchao.flatten import torch_dtype
from loadstone.errors import ArtifactError
from loadstone.finalization.experts import experts_by_inputs, round_expert, watch_experts
from loadstone.finalization.gptq import gptq
from loadstone.finalization.layers import Call, Laps, run_layer
from loadstone.finalization.plan import Step
from loadstone.finalization.smooth import awq_scale, find_folds, smooth_scale
from loadstone.finalization.statistics import Inputs, InputStatistics, divide
from loadstone.quantization.quantize import quantize_scaled, quantize_weight
from loadstone.quantization.rounding import least_squares_weight
from loadstone.quantization.schemes import Int8DynActIntxWeight, IntxWeightOnly
from loadstone.ranks import Ranks

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_INTX = (IntxWeightOnly, Int8DynActIntxWeight)
_SCALES = {"awq": awq_scale, "smoothquant": smooth_scale}


@dataclass(frozen=True)
class Rows:
    """This rank's share of the calibration rows at a layer: ``hidden``, (1, length, width) each, and the layer's other
    arguments. ``shape``: rows of all ranks and tokens of each."""

    hidden: list[torch.Tensor]
    call: Call
    shape: tuple[int, int]
    device: str
    ranks: Ranks

    @property
    def first(self) -> int:
        """How many of this rank's rows are among the first eighth of all."""
        return len(range(self.ranks.rank, -(-self.shape[0] // 8), self.ranks.size))

    def run(self, layer: torch.nn.Module) -> list[torch.Tensor]:
        """The outputs of ``layer``, where the inputs are."""
        return [run_layer(layer, x, self.call, self.device) for x in self.hidden]


def round_layer(
    layer: torch.nn.Module, inside: dict[str, Step], experts: dict[str, list[Step]], rows: Rows
) -> dict[str, torch.Tensor]:
    """What this rank has to store of a layer, by name: its share of the rounded Linears and experts; of rank 0 also
    the other parameters that a scale was folded into, which the layer of every rank has afterwards.

    ``inside``: the step of each parameter; ``experts``: the steps of each merged one, one a matrix. Raises
    `ArtifactError` for a Linear that no text reaches, and where inputs are to be scaled and nothing can take it over.
    """
    wanted = {
        name.removesuffix(".weight"): step
        for name, step in inside.items()
        if step.scheme and step.scheme.calibrated
    }
    shares = experts_by_inputs(layer, experts)
    laps = Laps(rows.device)
    inputs, source, owners = _statistics(layer, wanted, shares, rows, laps)
    rank = rows.ranks.rank
    parts: dict[str, torch.Tensor] = {}
    for key, steps in shares.items():
        if key in inputs and owners[key] == rank:
            parts |= round_expert(layer, key[0], steps, inputs[key])
    untouched = {*(f"{name}.weight" for name in wanted), *experts}
    before = {n: p.detach().clone() for n, p in layer.named_parameters() if n not in untouched}
    scales = _fold_scales(layer, wanted, inputs, source, owners, rows)
    together: dict[Any, list[str]] = {}
    for name, step in wanted.items():
        if owners[source[name]] == rank:
            assert step.encoding is not None and step.scheme is not None
            alone = "" if step.scheme.algorithm == "gptq" else name
            alike = (source[name], step.scheme, step.encoding.dtype, alone)
            together.setdefault(alike, []).append(name)
    for (first, scheme, *_), names in together.items():
        weights = [_weight(layer, name, wanted[name]) for name in names]
        if scheme.algorithm == "gptq":
            moment = inputs[first].moment
            assert moment is not None
            tensors = gptq(weights, moment, scheme)
        else:
            step, scale = wanted[names[0]], scales.get(names[0])
            tensors = [_rounded(weights[0], step, inputs[first], scale)]
        for name, tensor in zip(names, tensors, strict=True):
            encoding = wanted[name].encoding
            assert encoding is not None
            parts |= {n: p.cpu().contiguous() for n, p in encoding.store(tensor).items()}
    for name, old in before.items():
        new = layer.get_parameter(name)
        if rank == 0 and not new.equal(old):
            output = inside[name].outputs[0]
            parts[output.name] = new.detach().to("cpu", torch_dtype(output.dtype)).contiguous()
    laps.lap(f"{len(parts)} tensors rounded")
    log.debug("calibration: %s", laps)
    return parts


def _statistics(
    layer: torch.nn.Module,
    wanted: dict[str, Step],
    shares: dict[tuple[str, int], list[Step]],
    rows: Rows,
    laps: Laps,
) -> tuple[dict[Any, Inputs], dict[str, str], dict[Any, int]]:
    """Statistics of the inputs of Linears and experts, by key; the key of each Linear (Linears that share an input
    share its statistics, under the name of the first); and the rank that rounds what has a key."""
    seen: list[tuple[torch.Tensor, str]] = []
    source: dict[str, str] = {}
    statistics = InputStatistics(rows.shape[0] * rows.shape[1])

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            source[name] = next((other for tensor, other in seen if tensor is x), name)
            if source[name] == name:
                seen.append((x, name))
                statistics.see(name, x)

        return hook

    def look(count: int | None = None) -> dict[Any, list[Step]]:
        """Run some or all rows; returns the steps of each key that any rank has seen so far."""
        for x in rows.hidden[:count]:
            seen.clear()
            run_layer(layer, x, rows.call, rows.device)
        seen.clear()
        statistics.share_largest(rows.ranks, rows.device)
        for each in rows.ranks.gather(dict(source)):
            source.update(each)
        steps: dict[Any, list[Step]] = {key: shares[key] for key in shares if key in statistics.largest}
        for name in filter(source.__contains__, wanted):
            steps.setdefault(source[name], []).append(wanted[name])
        for key, found in steps.items():
            if statistics.largest[key].isinf().any():
                raise ArtifactError(
                    f"the inputs of '{found[0].name}' are NaN or infinite", "Use another checkpoint or text"
                )
        return steps

    handles = [layer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in wanted]
    unwatch = watch_experts(layer, list(dict.fromkeys(name for name, _ in shares)), statistics.see)
    if any(map(_needs_sums, (*wanted.values(), *(step for steps in shares.values() for step in steps)))):
        statistics.begin_sums(_summed(look(rows.first)))
    steps = look()
    if not statistics.fits(_summed(steps)):
        statistics.begin_sums(_summed(steps), exactly=True)
        look()
    for handle in handles:
        handle.remove()
    unwatch()
    for name, step in wanted.items():
        if name not in source:
            raise ArtifactError(
                f"the calibration text never reaches '{step.name}'", "Use more text, or skip it"
            )
    # Of GPTQ: a factor of the second moment, and a product with it for each row of the weights.
    width = {key: statistics.largest[key].numel() for key in steps}
    costs = {
        key: width[key] ** 2 * (width[key] + sum(step.source.shape[0] for step in found))
        for key, found in steps.items()
    }
    owners = divide(costs, rows.ranks)
    laps.lap("inputs")
    inputs = statistics.add_up(rows.ranks, owners)
    laps.lap("exchange")
    return inputs, source, owners


def _needs_sums(step: Step) -> bool:
    return step.scheme is not None and step.scheme.algorithm != "smoothquant"


def _summed(steps: dict[Any, list[Step]]) -> list[Any]:
    """The keys whose sums are needed."""
    return [key for key, found in steps.items() if any(map(_needs_sums, found))]


def _weight(layer: torch.nn.Module, name: str, step: Step) -> torch.Tensor:
    """A Linear's weight in the dtype that it is quantized in."""
    weight: Any = layer.get_submodule(name).weight
    assert step.encoding is not None
    return weight.detach().to(torch_dtype(step.encoding.dtype))


def _rounded(weight: torch.Tensor, step: Step, inputs: Inputs, scale: torch.Tensor | None) -> torch.Tensor:
    """A Linear's quantized ``weight``, by awq or smoothquant. ``scale``: what was folded into its columns."""
    assert step.encoding is not None and step.scheme is not None
    algorithm = step.scheme.algorithm
    if step.encoding.scales_inputs:
        own = _SCALES[algorithm](inputs, [(weight, step.scheme)])
        return quantize_scaled(weight, step.scheme, own)
    if algorithm == "awq" and isinstance(step.scheme, _INTX) and inputs.moment is not None:
        # The paper's clipping: each group's range is what changes the outputs least.
        matters = inputs.moment.diagonal()
        return least_squares_weight(
            weight, step.scheme, matters if scale is None else matters / scale.square()
        )
    return quantize_weight(weight, step.scheme)


def _fold_scales(
    layer: torch.nn.Module,
    wanted: dict[str, Step],
    inputs: dict[Any, Inputs],
    source: dict[str, str],
    owners: dict[Any, int],
    rows: Rows,
) -> dict[str, torch.Tensor]:
    """Scale the columns of Linears whose tensors cannot scale their inputs, and fold that; returns scales by Linear.

    Folds are proven by rank 0 on the first row; the rank that has a fold's second moments chooses its scale.
    """
    names = [
        name
        for name, step in wanted.items()
        if step.scheme
        and step.scheme.algorithm in _SCALES
        and not (step.encoding and step.encoding.scales_inputs)
    ]
    if not names:
        return {}
    folds = None
    if rows.ranks.rank == 0:

        def run() -> torch.Tensor:
            return run_layer(layer, rows.hidden[0], rows.call, rows.device)

        folds = find_folds(layer, names, run, list(wanted))
    mine = {}
    for number, fold in enumerate(folds := rows.ranks.from_first(folds)):
        members = [(_weight(layer, name, wanted[name]), wanted[name].scheme) for name in fold.linears]
        algorithms = {scheme.algorithm for _, scheme in members if scheme}
        key = source[fold.linears[0]]
        if len(algorithms) == 1 and owners[key] == rows.ranks.rank:
            scale = _SCALES[algorithms.pop()](inputs[key], members, fold.repeat)  # type: ignore[arg-type]
            mine[number] = scale.cpu()
    chosen: dict[int, torch.Tensor] = {}
    for each in rows.ranks.gather(mine):
        chosen |= each
    if not chosen:
        raise ArtifactError(
            f"no norm or Linear of {type(layer).__name__} can take over a scale of its inputs, and the tensors of "
            f"'{wanted[names[0]].scheme}' hold none",
            "Use --algorithm gptq",
        )
    # All scales are chosen on the weights as they came.
    found: dict[str, torch.Tensor] = {}
    for number, fold in enumerate(folds):
        if number in chosen:
            scale = chosen[number].to(rows.device)
            fold.apply(layer, scale)
            found |= dict.fromkeys(fold.linears, scale)
    return found

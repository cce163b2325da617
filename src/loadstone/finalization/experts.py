"""Calibrated rounding of merged experts: each expert's matrices on the inputs that the router sends to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from loadstone.artifact.torchao.flatten import torch_dtype
from loadstone.errors import ArtifactError
from loadstone.finalization.gptq import gptq
from loadstone.finalization.layers import PLAIN
from loadstone.finalization.plan import Step
from loadstone.finalization.statistics import Inputs
from loadstone.loading.layer_inputs import sees_experts, takes_batches
from loadstone.quantization.model_facts import expert_layout, expert_matrix
from loadstone.quantization.quantize import quantize_weight
from loadstone.quantization.rounding import least_squares_weight
from loadstone.quantization.schemes import Intx

if TYPE_CHECKING:
    import torch
    from torch import nn

# Reads a stored tensor, by its name.
Stored = Mapping[str, Callable[[], "torch.Tensor"]]
# Tokens that an expert must have seen for its inputs to count: fewer say little about others.
FEWEST = 128


def experts_by_inputs(layer: nn.Module, experts: dict[str, list[Step]]) -> dict[tuple[str, int], list[Step]]:
    """The steps that are calibrated of each merged parameter's name and expert: they share their inputs."""
    found: dict[tuple[str, int], list[Step]] = {}
    for name, steps in experts.items():
        for step in filter(_calibrated, steps):
            found.setdefault((name, _matrix(layer, name, step)[0]), []).append(step)
    return found


def round_expert(layer: nn.Module, name: str, steps: list[Step], inputs: Inputs) -> dict[str, torch.Tensor]:
    """The stored tensors, by name, of one expert's matrices in a merged parameter; none if it saw too few tokens.

    GPTQ uses the second moments of the expert's inputs, AWQ their sizes; a scale of inputs has no place here, since one
    norm serves all experts.
    """
    if inputs.count < FEWEST:
        return {}
    assert inputs.moment is not None
    together: dict[Any, list[Step]] = {}
    for step in steps:
        assert step.encoding is not None
        together.setdefault((step.scheme, step.encoding.dtype), []).append(step)
    parts: dict[str, torch.Tensor] = {}
    for (scheme, dtype), members in together.items():
        weights = [_matrix(layer, name, step)[1].to(torch_dtype(dtype)) for step in members]
        if scheme.algorithm == "gptq" and isinstance(scheme, Intx):
            tensors = gptq(weights, inputs.moment, scheme)
        elif scheme.algorithm == "awq" and isinstance(scheme, Intx):
            tensors = [least_squares_weight(each, scheme, inputs.moment.diagonal()) for each in weights]
        else:
            tensors = [quantize_weight(each, scheme) for each in weights]
        for step, tensor in zip(members, tensors, strict=True):
            assert step.encoding is not None
            parts |= {key: part.cpu().contiguous() for key, part in step.encoding.store(tensor).items()}
    return parts


def use_experts(layer: nn.Module, experts: dict[str, list[Step]], stored: Stored, device: str) -> list[str]:
    """Put the rounded experts of ``stored`` into the layer, and plainly rounded ones for those that it lacks; returns
    the names of these."""
    lacking: list[str] = []
    for name, steps in experts.items():
        for step in filter(_calibrated, steps):
            assert step.encoding is not None
            _, matrix = _matrix(layer, name, step)
            if step.outputs[0].name in stored:
                parts = {o.name: stored[o.name]().to(device) for o in step.outputs}
            else:
                lacking.append(step.name)
                plain = plainly(step)
                weight = matrix.to(torch_dtype(step.encoding.dtype))
                assert plain.scheme is not None and plain.encoding is not None
                parts = plain.encoding.store(quantize_weight(weight, plain.scheme))
            matrix.copy_(step.encoding.dequantize(parts))
    return lacking


def plainly(step: Step) -> Step:
    """The step with a rounding that needs no text."""
    from dataclasses import replace

    assert step.encoding is not None
    scheme = step.encoding.scheme
    return replace(step, encoding=step.encoding.with_scheme(scheme.rounded_by(scheme.algorithms[0])))


def _calibrated(step: Step) -> bool:
    return step.scheme is not None and step.scheme.calibrated


def _matrix(layer: nn.Module, name: str, step: Step) -> tuple[int, torch.Tensor]:
    """The expert that a step is about, and its matrix (out, in) within the merged parameter."""
    owner, _, last = name.rpartition(".")
    layout = expert_layout(layer.get_submodule(owner), last)
    assert layout is not None
    whole = layer.get_parameter(name).data
    expert, first = divmod(step.first_row, whole.shape[2 if layout.transposed else 1])
    return expert, expert_matrix(whole[expert], first, step.source.shape[0], layout)


def watch_experts(
    layer: nn.Module, names: list[str], see: Callable[[tuple[str, int], torch.Tensor], None]
) -> Callable[[], None]:
    """Call ``see((name, expert), inputs)`` with what each expert's part of each named parameter is multiplied by;
    returns what ends that."""
    undo = ExitStack()

    def watch(owner: str, weights: list[str]) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
            for expert, rows in _routed(module, *args):
                if first in weights:
                    see((f"{owner}.{first}", expert), rows)
                if "down_proj" in weights:
                    see((f"{owner}.down_proj", expert), _between(module, first, rows, expert))

        return hook

    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = layer.get_submodule(owner)
        weights = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == owner]
        if not all(sees_experts(module, weight) for weight in weights):
            raise ArtifactError(
                f"the inputs of '{names[0]}' cannot be seen in {type(module).__name__}", PLAIN
            )
        undo.callback(module.register_forward_pre_hook(watch(owner, weights)).remove)
    return undo.close


def _routed(module: Any, x: torch.Tensor, chosen: Any = None, *_: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that has work with its inputs (tokens, in), from the arguments of the experts' forward."""
    if takes_batches(module):
        for expert, batch in enumerate(x.view(module.num_experts, -1, x.shape[-1])):
            if len(rows := batch[batch.any(1)]):
                yield expert, rows
        return
    x = x.reshape(-1, x.shape[-1])
    chosen = chosen.reshape(len(x), -1)
    for expert in chosen.unique().tolist():
        if expert < module.num_experts:
            yield expert, x[(chosen == expert).any(1)]


def _between(module: Any, first: str, rows: torch.Tensor, expert: int) -> torch.Tensor:
    """What an expert multiplies by its last matrix for the inputs ``rows``."""
    weight, bias = getattr(module, first)[expert], getattr(module, f"{first}_bias", None)
    layout = expert_layout(module, first)
    product = rows @ (weight if layout and layout.transposed else weight.t())
    if bias is not None:
        product = product + bias[expert]
    if takes_batches(module):
        gate, up = product.chunk(2, -1)
        return up * module.act_fn(gate)
    between: torch.Tensor = module._apply_gate(product) if module.has_gate else module.act_fn(product)
    return between

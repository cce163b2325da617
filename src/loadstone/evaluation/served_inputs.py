"""`eval --activations`: a compressed-tensors model whose layers round their inputs as a server does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.compressed_tensors import LayerScheme, PackedWeight
from loadstone.artifact.compressed_tensors.merging import merged_sets
from loadstone.artifact.compressed_tensors.scheme import NVFP4
from loadstone.errors import ArtifactError
from loadstone.loading.layer_inputs import Change, change_inputs
from loadstone.loading.meta import destinations
from loadstone.quantization.served_inputs import describe_inputs, round_inputs

if TYPE_CHECKING:
    import torch

_LEAVE = "Leave out --activations"


def inputs_rounded(artifact: Artifact) -> str:
    """How an artifact's layers round their inputs, for people; empty where they do not.

    Raises `ArtifactError` for a scheme whose inputs cannot be rounded here.
    """
    found = {}
    for weight in _with_inputs(artifact).values():
        if weight.scheme not in found:
            found[weight.scheme] = describe_inputs(weight.scheme)
            if not found[weight.scheme]:
                raise ArtifactError(
                    f"'{artifact.root}': inputs of {weight.scheme} ('{weight.module}') cannot be rounded here",
                    _LEAVE,
                )
    each = dict.fromkeys(found.values())
    return f"{'; '.join(each)} (as vLLM 0.32)" if each else ""


def input_changes(artifact: Artifact, model: Any) -> dict[str, Change]:
    """What happens to the input of each parameter of ``model``, which may be on the meta device."""
    rounded = _with_inputs(artifact)
    scales = _scales(artifact, rounded)
    places = destinations(model, [weight.name for weight in rounded.values()])
    members: dict[str, list[PackedWeight]] = {}
    for weight in rounded.values():
        place = places[weight.name]
        if place is None:
            raise ArtifactError(f"'{weight.name}' is not part of {type(model).__name__}", _LEAVE)
        members.setdefault(place.parameter, []).append(weight)
    changes: dict[str, Change] = {}
    for parameter, weights in members.items():
        schemes = {weight.scheme for weight in weights}
        if len(schemes) > 1:
            raise ArtifactError(f"the experts of '{parameter}' round their inputs in different ways", _LEAVE)
        stored = [scales[weight.module] for weight in weights if weight.module in scales]
        changes[parameter] = _change(schemes.pop(), stored)
    return changes


def _with_inputs(artifact: Artifact) -> dict[str, PackedWeight]:
    """The weights, by module, whose layers have quantized inputs."""
    weights = (weight for weight in artifact.packed.values() if isinstance(weight, PackedWeight))
    return {weight.module: weight for weight in weights if weight.scheme.inputs is not None}


def _change(scheme: LayerScheme, stored: list[tuple[torch.Tensor, torch.Tensor | None]]) -> Change:
    """``stored``: scales and zero points of the input: several for the experts of a layer."""
    if not scheme.measures_inputs:
        return partial(round_inputs, scheme=scheme)
    # Experts share the widest range: NVFP4 stores divisors.
    choose = min if scheme.format == NVFP4 else max
    scale, zero = choose(stored, key=lambda pair: float(pair[0]))

    def change(x: torch.Tensor) -> torch.Tensor:
        return round_inputs(x, scheme, scale.to(x.device), None if zero is None else zero.to(x.device))

    return change


def _scales(
    artifact: Artifact, rounded: dict[str, PackedWeight]
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """The stored scale and zero point of each module's input; of layers that vLLM merges the largest of theirs."""

    def read(module: str, suffix: str) -> torch.Tensor | None:
        info = artifact.tensors.get(f"{module}.{suffix}")
        return None if info is None else artifact.source.read(info).reshape(-1)

    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for module, weight in rounded.items():
        if not weight.scheme.measures_inputs:
            continue
        name = "input_global_scale" if weight.scheme.format == NVFP4 else "input_scale"
        scale, zero = read(module, name), read(module, "input_zero_point")
        if scale is None or scale.numel() != 1 or not float(scale) > 0:
            raise ArtifactError(f"'{module}' has no {name} that its inputs could be rounded by", _LEAVE)
        found[module] = scale, None if weight.scheme.inputs and weight.scheme.inputs.symmetric else zero
    for names in merged_sets(found):
        if len({float(found[name][0]) for name in names}) > 1:
            found |= dict.fromkeys(names, max((found[n] for n in names), key=lambda pair: float(pair[0])))
    return found


def round_model_inputs(model: Any, changes: Mapping[str, Change]) -> Callable[[], None]:
    """`change_inputs`, with the remedy of this command where an input cannot be seen."""
    try:
        return change_inputs(model, changes)
    except ArtifactError as error:
        raise ArtifactError(error.message, _LEAVE) from None

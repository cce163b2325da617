"""Whether a quantized artifact's kernels exist where it is to be loaded, asked before anything is loaded."""

from __future__ import annotations

import logging
from typing import Any

from loadstone.artifact import Artifact
from loadstone.errors import MissingError
from loadstone.loading.quantizer import recovered_scheme
from loadstone.quantization.schemes import Int4WeightOnly, recipe_for

log = logging.getLogger(__name__)

# Classes whose tensors implement the casts that accelerate's offload hooks make (seen with torchao 0.18).
_MOVABLE = {"IntxUnpackedToInt8Tensor"}


def check_kernels(artifact: Artifact, device_map: Any) -> None:
    """Raise `MissingError` when the artifact cannot run on the devices of the map; say when weights are repacked."""
    if not artifact.is_torchao:
        return
    recipe = recipe_for(recovered_scheme(artifact))
    kinds = {"cpu"} if device_map is None else {_kind(device) for device in device_map.values()}
    fixed = sorted({tensor.type for tensor in artifact.quantized.values()} - _MOVABLE)
    if len(kinds) > 1 and fixed:
        raise MissingError(
            f"'{artifact.root}' does not fit the GPU, and accelerate cannot move a {fixed[0]} between CPU and GPU",
            "Use --device cpu, a larger GPU, or an intx recipe",
        )
    on_cpu = "cpu" in kinds and "cpu" not in recipe.devices
    if on_cpu and isinstance(recipe.scheme, Int4WeightOnly):
        log.info(
            "%s: int4 weights packed for CUDA are repacked for the CPU's int4 kernel, value for value",
            artifact.root,
        )
    elif on_cpu:
        raise MissingError(
            f"'{artifact.root}' is {recipe.name}, which needs {recipe.needs}", "Use --device cuda there"
        )
    elif recipe.needs and "cpu" not in kinds:
        from loadstone.quantization.quantize import check_runs

        check_runs(recipe, "cuda:0", "bfloat16")


def _kind(device: Any) -> str:
    return "cuda" if isinstance(device, int) else str(device).partition(":")[0]

"""The serving layout's view of a recipe: which compressed-tensors scheme it is, and its torchao values in that layout.

Rounding is the same as for torchao's own layout. Only the container differs: `stored_rows` moves the integers, small
floats and scales of a torchao tensor over without changing one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadstone.artifact.compressed_tensors import LayerScheme
from loadstone.artifact.compressed_tensors.scheme import MXFP4, MXFP8, NVFP4, PACK
from loadstone.errors import UsageError
from loadstone.quantization.packing import (
    input_divisor,
    pack_ints,
    pack_zero_points,
    plain_block_scales,
    scale_as_divisor,
    scales_in,
)
from loadstone.quantization.schemes import FLOAT8_BLOCK, Scheme, recipe_for

if TYPE_CHECKING:
    import torch


def layer_scheme(scheme: Scheme) -> LayerScheme:
    """The layout's scheme for a recipe's; raises `UsageError` with the nearest recipe that servers can run."""
    found = scheme.serving
    if found is None:
        why, instead = scheme.unserved
        raise UsageError(f"{recipe_for(scheme)} has no serving layout: {why}", f"Use {instead}")
    return found


def float8_blocks(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """``qdata`` and ``scale`` of rows (a multiple of 128) in squares of 128 x 128: the largest magnitude becomes 448.

    The scale is rounded to the rows' dtype first, so that what is stored is what rounding used.
    """
    import torch

    squares = rows.float().unflatten(1, (-1, FLOAT8_BLOCK)).unflatten(0, (-1, FLOAT8_BLOCK))
    scale = (squares.abs().amax((1, 3)) / 448).to(rows.dtype)
    scale = torch.where(scale == 0, 1, scale)
    values = (squares / scale.float()[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"qdata": values.reshape(rows.shape), "scale": scale}


def stored_rows(
    layer: LayerScheme, parts: dict[str, torch.Tensor], dtype: torch.dtype, name: str
) -> dict[str, torch.Tensor]:
    """Stored tensors of some rows, by suffix, from the parts of a torchao tensor (``qdata``, ``scale``, …).

    ``dtype``: of the model. Tensors that a weight has once (`whole_tensors`) are left out. Raises `ArtifactError`
    naming the tensor for scales that ``dtype`` does not hold.
    """
    import torch

    values, scale = parts["qdata"], parts["scale"]
    if layer.format in (NVFP4, MXFP4, MXFP8):
        rows = values.shape[0]
        columns = values.shape[1] * (2 if layer.packed else 1)
        groups = columns // (layer.weights.group_size or columns)
        if scale.shape != (rows, groups):
            scale = plain_block_scales(scale, rows, groups)
        if layer.format == NVFP4:
            return {"weight_packed": values, "weight_scale": scale}
        packed = "weight_packed" if layer.packed else "weight"
        return {packed: values, "weight_scale": scale.view(torch.uint8)}
    rows = values.shape[0]
    if layer.weights.strategy == "block":
        return {"weight": values, "weight_scale": scale}
    scale = scales_in(scale.reshape(-1, scale.shape[-1]) if scale.dim() else scale.reshape(1, 1), dtype, name)
    found = {"weight_scale": scale.expand(rows, -1)}
    if layer.format != PACK:
        return found | {"weight": values}
    found["weight_packed"] = pack_ints(values, layer.weights.bits)
    if not layer.weights.symmetric:
        found["weight_zero_point"] = pack_zero_points(parts["zero_point"], layer.weights.bits)
    return found


def whole_tensors(
    layer: LayerScheme,
    parts: dict[str, torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    largest_input: float | None = None,
) -> dict[str, torch.Tensor]:
    """Stored tensors that a weight of ``shape`` has once, by suffix.

    ``largest_input``: magnitude of the layer's inputs, where a scale of them is stored (`LayerScheme.measures_inputs`).
    """
    import torch

    if layer.format == PACK:
        return {"weight_shape": torch.tensor(shape)}
    if layer.format == NVFP4:
        found = {"weight_global_scale": scale_as_divisor(parts["per_tensor_scale"], dtype)}
        return (
            found if largest_input is None else found | {"input_global_scale": input_divisor(largest_input)}
        )
    return {}

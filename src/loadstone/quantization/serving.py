"""The serving layout's view of a recipe: which compressed-tensors scheme it is, and its torchao values in that layout.

Rounding is the same as for torchao's own layout. Only the container differs: `stored_rows` moves the integers, small
floats and scales of a torchao tensor over without changing one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadstone.artifact.compressed_tensors import LayerScheme, QuantArgs
from loadstone.artifact.compressed_tensors.scheme import FLOAT, INT, MXFP4, MXFP8, NAIVE, NVFP4, PACK
from loadstone.errors import UsageError
from loadstone.quantization.packing import (
    pack_ints,
    pack_zero_points,
    plain_block_scales,
    scale_as_divisor,
    scales_in,
)
from loadstone.quantization.schemes import (
    Float8DynActFloat8Weight,
    Float8DynActInt4Weight,
    Float8WeightOnly,
    Int4WeightOnly,
    Int8DynActInt8Weight,
    Int8DynActIntxWeight,
    Int8WeightOnly,
    IntxWeightOnly,
    MxDynActMxWeight,
    Nvfp4DynActNvfp4Weight,
    Nvfp4WeightOnly,
    Scheme,
    recipe_for,
)

if TYPE_CHECKING:
    import torch

_TOKEN_INT8 = QuantArgs(8, "int", "token", dynamic=True)
_TOKEN_FP8 = QuantArgs(8, "float", "token", dynamic=True)
_NVFP4 = QuantArgs(4, "float", "tensor_group", 16)


def layer_scheme(scheme: Scheme) -> LayerScheme:
    """The layout's scheme for a recipe's; raises `UsageError` naming the nearest recipe that servers have a kernel for.

    A scale of the whole tensor is stored once a row: servers that merge layers would otherwise round the weights again
    to one scale.
    """
    match scheme:
        case IntxWeightOnly(bits=4 | 8 as bits, group_size=group, mapping=mapping):
            symmetric = mapping == "symmetric"
            weights = QuantArgs(
                bits, "int", "group" if group else "channel", group or None, symmetric=symmetric
            )
            return LayerScheme(PACK, weights)
        case Int8WeightOnly():
            return LayerScheme(PACK, QuantArgs(8, "int", "channel"))
        case Int8DynActInt8Weight(act_mapping=mapping):
            inputs = QuantArgs(8, "int", "token", symmetric=mapping == "symmetric", dynamic=True)
            return LayerScheme(INT, QuantArgs(8, "int", "channel"), inputs)
        case Float8WeightOnly():
            return LayerScheme(NAIVE, QuantArgs(8, "float", "channel"))
        case Float8DynActFloat8Weight():
            return LayerScheme(FLOAT, QuantArgs(8, "float", "channel"), _TOKEN_FP8)
        case Nvfp4WeightOnly():
            return LayerScheme(NVFP4, _NVFP4)
        case MxDynActMxWeight(bits=4):
            return LayerScheme(MXFP4, QuantArgs(4, "float", "group", 32))
        case MxDynActMxWeight():
            values = QuantArgs(8, "float", "group", 32, scale_dtype="uint8")
            inputs = QuantArgs(8, "float", "group", 32, dynamic=True, scale_dtype="uint8")
            return LayerScheme(MXFP8, values, inputs)
    why, instead = _no_kernel(scheme)
    raise UsageError(f"{recipe_for(scheme)} has no serving layout: {why}", f"Use {instead}")


def _no_kernel(scheme: Scheme) -> tuple[str, str]:
    match scheme:
        case IntxWeightOnly(bits=bits):
            return f"servers have kernels for 4 and 8 bits, not for {bits}", "intx4-weight-only"
        case Int8DynActIntxWeight(bits=8):
            return (
                "no GPU kernel reads int8 inputs with 8-bit weights in groups",
                "int8-dynamic-act-int8-weight",
            )
        case Int8DynActIntxWeight():
            return "no GPU kernel reads int8 inputs with weights of fewer bits", "intx4-weight-only"
        case Int4WeightOnly():
            return "its zero points are not integers", "intx4-weight-only:group_size=128,mapping=asymmetric"
        case Float8DynActInt4Weight():
            return "torchao packs it for one kernel", "intx4-weight-only:group_size=128"
        case Nvfp4DynActNvfp4Weight():
            return "ranges of inputs are not calibrated", "nvfp4-weight-only"
    return "it is not among those that servers read", "intx4-weight-only"


def rounding_scheme(scheme: Scheme) -> Scheme:
    """The scheme that torchao rounds the weights by: without the inputs, where their kernels would need a GPU."""
    if isinstance(scheme, Float8DynActFloat8Weight):
        return Float8WeightOnly(granularity=scheme.granularity)
    return scheme


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
    scale = scales_in(scale.reshape(-1, scale.shape[-1]) if scale.dim() else scale.reshape(1, 1), dtype, name)
    found = {"weight_scale": scale.expand(rows, -1)}
    if layer.format != PACK:
        return found | {"weight": values}
    found["weight_packed"] = pack_ints(values, layer.weights.bits)
    if not layer.weights.symmetric:
        found["weight_zero_point"] = pack_zero_points(parts["zero_point"], layer.weights.bits)
    return found


def whole_tensors(
    layer: LayerScheme, parts: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Stored tensors that a weight of ``shape`` has once, by suffix."""
    import torch

    if layer.format == PACK:
        return {"weight_shape": torch.tensor(shape)}
    if layer.format == NVFP4:
        return {"weight_global_scale": scale_as_divisor(parts["per_tensor_scale"], dtype)}
    return {}

"""Quantize one weight with torchao, or predict the stored tensors without doing it."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

from loadstone.artifact import FlatTensor
from loadstone.artifact.torchao.flatten import flatten, torch_dtype
from loadstone.errors import MissingError
from loadstone.quantization.rounding import least_squares_weight, plain_weight
from loadstone.quantization.schemes import (
    Intx,
    Nvfp4WeightOnly,
    Recipe,
    Scheme,
)
from loadstone.quantization.torchao_config import to_torchao

if TYPE_CHECKING:
    import torch


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Quantize a Linear's ``weight`` (out, in) as `torchao.quantize_` does; returns a torchao tensor on its device.

    One difference: torchao divides rows of zeros by a float8 scale of zero, which gives NaN; here they stay zeros.
    """
    import torch
    from torchao.quantization import quantize_

    if isinstance(scheme, Intx):
        if scheme.algorithm == "mse":
            return least_squares_weight(weight, scheme)
        if scheme.algorithm != "hqq" and weight.device.type == "cpu":
            return plain_weight(weight, scheme)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(linear, to_torchao(scheme))
    tensor = linear.weight.detach()
    if type(tensor).__name__ == "Float8Tensor" and not weight.is_meta:
        empty = tensor.scale == 0  # type: ignore[attr-defined]
        if empty.any():
            tensor.qdata.view(torch.uint8).masked_fill_(empty, 0)  # type: ignore[attr-defined]
            tensor.scale.masked_fill_(empty, 1)  # type: ignore[attr-defined]
    return tensor


def quantize_rows(
    rows: torch.Tensor, scheme: Scheme, low: torch.Tensor, high: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Quantize some rows of a weight whose scale follows from the extremes ``low`` and ``high`` of the whole weight
    (see `Scheme.whole_extremes`); returns the stored parts of these rows by torchao's names."""
    import torch

    if isinstance(scheme, Nvfp4WeightOnly):
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

        # As torchao's own transform calls it, with the largest value of all rows.
        largest = torch.maximum(low.abs(), high.abs())
        tensor = NVFP4Tensor.to_nvfp4(
            rows, per_tensor_scale=per_tensor_amax_to_scale(largest), is_swizzled_scales=True
        )
        return {name: part for name in _data_names(tensor) if (part := getattr(tensor, name)) is not None}
    # An extra row holds the extremes, so that the scale is that of the whole weight.
    more = rows.new_zeros(1, rows.shape[1])
    more[0, 0], more[0, -1] = low, high
    tensor = quantize_weight(torch.cat((rows, more)), scheme)
    parts = {name: getattr(tensor, name) for name in _data_names(tensor)}
    return {name: part[:-1] if len(part) > 1 else part for name, part in parts.items() if part is not None}


def _data_names(tensor: torch.Tensor) -> list[str]:
    return [*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", ())]  # type: ignore[attr-defined]


def quantize_scaled(weight: torch.Tensor, scheme: Scheme, scale: torch.Tensor) -> torch.Tensor:
    """Quantize ``weight`` (out, in) with its columns multiplied by ``scale`` (in,); the tensor divides its inputs by
    the same scale, as those of torchao's AWQ and SmoothQuant do."""
    scale = scale.to(weight.dtype)
    tensor = quantize_weight(weight * scale, scheme)
    tensor.act_pre_scale = 1.0 / scale  # type: ignore[attr-defined]
    return tensor


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Dequantize a torchao tensor to the matrix (out, in) that it multiplies inputs by, scales of inputs included."""
    import torch

    pre_scale = getattr(tensor, "act_pre_scale", None)
    if hasattr(tensor, "dequantize") and type(tensor).__name__ != "Int4TilePackedTo4dTensor":
        weight = tensor.dequantize()
        return weight if pre_scale is None else weight * pre_scale
    # Packed for a kernel: its product with the identity.
    eye = torch.eye(tensor.shape[1], dtype=torch.bfloat16, device=tensor.device)
    return torch.nn.functional.linear(eye, tensor).t()


def template(scheme: Scheme, shape: tuple[int, ...], dtype: str, device: str) -> FlatTensor:
    """Predict what quantizing a weight of this shape stores: class, attributes, dtypes and shapes of its parts.

    ``dtype`` in safetensors' spelling.
    """

    def quantized_zeros(where: str) -> FlatTensor:
        import torch

        weight = torch.zeros(shape, dtype=torch_dtype(dtype), device=where)
        if scheme.scales_inputs:
            ones = torch.ones(shape[-1], dtype=weight.dtype, device=where)
            return flatten("template.weight", quantize_scaled(weight, scheme, ones))[0]
        return flatten("template.weight", quantize_weight(weight, scheme))[0]

    try:
        return quantized_zeros("meta")
    except Exception:
        # Packing kernels have no meta version: quantize zeros on the device instead.
        return quantized_zeros(device)


def check_runs(recipe: Recipe, device: str, dtype: str) -> None:
    """Quantize, flatten and run one small Linear of ``dtype`` (``bfloat16``); raises `MissingError` with the reason
    and what to use instead.

    It tries, since what runs depends on the card, the packages and their versions.
    """
    kind = device.partition(":")[0]
    instead = f"Use {recipe.instead}" if recipe.instead else "Choose another recipe (--list-recipes)"
    if kind not in recipe.devices:
        raise MissingError(f"recipe '{recipe}' does not run on {kind}: it needs {recipe.needs}", instead)
    problem = _probe(recipe.scheme, device, dtype)
    if problem and dtype != "bfloat16" and not _probe(recipe.scheme, device, "bfloat16"):
        instead = "Pass --dtype bfloat16"
    if problem:
        needs = f"; it needs {recipe.needs}" if recipe.needs else ""
        raise MissingError(
            f"recipe '{recipe}' does not run here on {device} in {dtype} ({problem}){needs}", instead
        )


def _probe(scheme: Scheme, device: str, dtype_name: str) -> str:
    """Why one small Linear cannot be quantized, flattened and run; empty when it can."""
    import torch

    dtype = getattr(torch, dtype_name)
    group = int(getattr(scheme, "group_size", 0))
    # Kernels take 1024 columns; groups that do not divide them are no kernel's.
    columns = lcm(32, group) if 0 < group <= 1 << 16 and 1024 % group else 1024
    try:
        linear = torch.nn.Linear(columns, 256, bias=False, dtype=dtype, device=device)
        linear.weight = torch.nn.Parameter(
            quantize_weight(linear.weight.detach(), scheme), requires_grad=False
        )
        flatten("probe.weight", linear.weight)
        with torch.inference_mode():
            linear(torch.ones(32, columns, dtype=dtype, device=device))
    except Exception as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""

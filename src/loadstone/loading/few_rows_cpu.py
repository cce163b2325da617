"""Products of quantized layers on a CPU that take no longer than those of the unquantized model.

torchao dequantizes most weights there at every call. For some rows torch's own kernels read integers as they are
stored (`_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm`), several times as fast as bfloat16. Every other weight is
dequantized once: that takes the memory of the unquantized model, and its time. Inputs are rounded as the recipe says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from loadstone.loading.input_rounding import int8_round_trip, int8_rows, mx_round_trip
from loadstone.quantization.quantize import dense

# With more rows the kernels take longer than dequantizing the weight and multiplying.
_MOST_ROWS = 32
_INT4_GROUPS = (32, 64, 128, 256)


class IntegerLinear(nn.Module):
    """A Linear whose quantized ``weight`` is multiplied by an integer kernel where the input has few rows.

    ``rounding`` rounds inputs to numbers of their dtype, or to (int8 values, scales (..., 1)).
    """

    def __init__(self, linear: nn.Linear, values: torch.Tensor, scale: torch.Tensor, rounding: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.rounding = linear.weight, linear.bias, rounding
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > _MOST_ROWS * self.in_features or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.weight, self.bias)
        rounded = x if self.rounding is None else self.rounding(x)
        rows, scales = rounded if isinstance(rounded, tuple) else (rounded, None)
        product = self.multiply(rows.reshape(-1, self.in_features).to(x.dtype))
        product = product.view(*x.shape[:-1], self.out_features)
        if scales is not None:
            product = (product * scales).to(x.dtype)
        return product if self.bias is None else product + self.bias

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Products (rows, out) of rows (rows, in)."""
        # A copy is aligned (see `_aligns`); a part of a caller's tensor may not be.
        return torch._weight_int8pack_mm(rows.clone(), self.values, self.scale)  # type: ignore[arg-type]


class Int4Linear(IntegerLinear):
    """The same with weights of at most four bits: ``values`` packed, ``scale`` (groups, out, 2) with what is added."""

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        group = self.in_features // len(self.scale)  # type: ignore[arg-type]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.values, group, self.scale)


class DenseLinear(nn.Module):
    """A Linear with a plain weight, in oneDNN's own layout where that multiplies bfloat16: a third less time for few
    rows. ``rounding`` rounds inputs to numbers of their dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rounding: Any) -> None:
        super().__init__()
        self._packed = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight
        self.bias, self.rounding = bias, rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.rounding is None else self.rounding(x)
        if not self._packed:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.weight.to_dense(), self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def faster_on_cpu(linear: nn.Linear) -> nn.Module | None:
    """A faster module than a quantized ``linear``; None for plain weights, and for inputs rounded in another way."""
    from torchao.utils import TorchAOBaseTensor

    weight: Any = linear.weight
    if not isinstance(weight, TorchAOBaseTensor) or weight.dim() != 2:
        return None
    kind, outputs = type(weight).__name__, weight.shape[0]
    scaled = getattr(weight, "act_pre_scale", None) is not None
    how = getattr(weight, "act_quant_kwargs", None)
    rounding: Any = None
    if kind == "IntxUnpackedToInt8Tensor":
        rounding = int8_round_trip if weight.activation_quantization is not None else None
        if not scaled and (found := _grouped(linear, rounding)) is not None:
            return found
    elif kind == "Int8Tensor" and how is not None:
        plain = type(how.granularity).__name__ == "PerRow" and not how.reduce_range
        if "ASYMMETRIC" in str(how.mapping_type) or not plain or weight.act_quant_scale is not None:
            return None
        rounding = int8_rows
    elif kind == "MXTensor" and how is not None and str(how.kernel_preference).endswith("EMULATED"):
        rounding = mx_round_trip(how.elem_dtype, how.block_size, how.scaling_mode)
    elif how is not None or kind == "Int4OpaqueTensor":
        return None
    if kind == "Int8Tensor" and not scaled and weight.scale.numel() == outputs and _aligns(weight):
        return _per_row(linear, rounding)
    if rounding is not None and (scaled or rounding is int8_rows):
        # Scales of inputs come before rounding, and integers are no inputs of a plain product.
        return None
    return DenseLinear(dense(weight.detach()).to(weight.dtype), linear.bias, rounding)


def _aligns(weight: torch.Tensor) -> bool:
    # In bfloat16 torch's kernel fails on rows that do not begin at a multiple of 64 bytes.
    return weight.shape[1] % 32 == 0


def _per_row(linear: nn.Linear, rounding: Any) -> nn.Module:
    weight: Any = linear.weight
    # Copies, since a file is mapped to memory that need not be aligned.
    scale = weight.scale.flatten().to(weight.dtype, copy=True)
    return IntegerLinear(linear, weight.qdata.clone(memory_format=torch.contiguous_format), scale, rounding)


def _grouped(linear: nn.Linear, rounding: Any) -> nn.Module | None:
    """An integer kernel for a weight of torchao's Intx class, None where there is none for its bits and groups."""
    weight: Any = linear.weight
    (outputs, inputs), group, zero = weight.shape, weight.block_size[-1], weight.zero_point
    if group == inputs and _aligns(weight) and not zero.any():
        return _per_row(linear, rounding)
    bits = int(str(weight.target_dtype).removeprefix("torch.int"))
    if bits > 4 or group not in _INT4_GROUPS or inputs % group or outputs % 16:
        return None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.qdata.to(torch.int32) + 8, 1)
    shift = (-zero.float() * weight.scale.float()).to(weight.scale.dtype)
    return Int4Linear(
        linear, packed, torch.stack((weight.scale, shift), -1).transpose(0, 1).contiguous(), rounding
    )

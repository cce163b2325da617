"""Faster products of weight-only quantized layers for one or a few rows, as a model that writes text computes them.

torchao's kernels for these recipes dequantize the weight or are made for many rows: on a GPU a token takes longer than
with the unquantized model. Here a kernel reads each stored value once. Sums are added in float32 in another order than
torchao's, and weights are not rounded to bfloat16 first: products agree to 1/64 of the largest one (`_TOLERANCE`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from loadstone.loading.few_rows_cpu import DenseLinear, IntegerLinear, faster_on_cpu
from loadstone.loading.input_rounding import share_rounding
from loadstone.loading.repack import unpack_int4_tiles
from loadstone.quantization.weight_use import weights_used_otherwise

log = logging.getLogger(__name__)
# The weight is read again for each row: for more of them torchao's own product is as fast.
MOST_ROWS = 4
_TOLERANCE = 1 / 64


class FewRowsLinear(nn.Module):
    """A Linear whose quantized ``weight`` is multiplied by the kernel where the input has few rows."""

    def __init__(self, linear: nn.Linear, stored: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._zeros = len(stored) == 3
        for name, tensor in zip(("values", "scale", "zero"), stored, strict=False):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > MOST_ROWS * self.in_features or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.weight, self.bias)
        from loadstone.loading.few_rows_kernel import bytes_product, nibbles_product

        rows = x.reshape(-1, self.in_features)
        if self.values.dtype == torch.int32:
            product = nibbles_product(rows, self.values, self.scale, self.zero if self._zeros else None)
        else:
            product = bytes_product(rows, self.values, self.scale)
        product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


def speed_up_decoding(model: Any) -> int:
    """Replace the quantized Linear layers of a model: on a GPU those of weight-only recipes. Returns how many were.

    A layer stays where the model reads its weight itself, where its recipe has no kernel, and where the kernel does not
    give what the layer gives on a probe.
    """
    read = weights_used_otherwise(model)
    count = 0
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name in read:
            continue
        replacement = _replacement(module)
        if replacement is not None and _agrees(module, replacement):
            model.set_submodule(name, replacement)
            count += 1
    share_rounding(model, (IntegerLinear, DenseLinear))
    log.info("%d layers are multiplied by kernels for few rows", count)
    return count


def _replacement(linear: nn.Linear) -> nn.Module | None:
    match linear.weight.device.type:
        case "cuda":
            stored = _stored(linear.weight)
            return None if stored is None else FewRowsLinear(linear, stored)
        case "cpu":
            return faster_on_cpu(linear)
    return None


def _stored(weight: Any) -> tuple[torch.Tensor, ...] | None:
    """The values and scales (and zeros) that a kernel takes; None for weights of another kind."""
    if (
        getattr(weight, "act_quant_kwargs", None) is not None
        or getattr(weight, "act_pre_scale", None) is not None
    ):
        return None
    outputs = weight.shape[0]
    match type(weight).__name__:
        case "Int8Tensor" | "Float8Tensor" if weight.dim() == 2 and weight.scale.numel() in (1, outputs):
            if weight.qdata.dtype not in (torch.int8, torch.float8_e4m3fn):
                return None
            return weight.qdata.contiguous(), weight.scale.flatten().expand(outputs).contiguous()
        case "IntxUnpackedToInt8Tensor":
            group = weight.block_size[-1]
            if str(weight.target_dtype) != "torch.int4" or not _fits(group, weight.shape[1]):
                return None
            zero = weight.zero_point
            values = pack_nibbles(weight.qdata, group)
            if not zero.any():
                return values, weight.scale.contiguous()
            return values, weight.scale.contiguous(), (-zero.float() * weight.scale.float()).contiguous()
        case "Int4TilePackedTo4dTensor" if weight.dim() == 2:
            group = weight.block_size[-1]
            if not _fits(group, weight.shape[1]):
                return None
            outputs, inputs = weight.shape
            scale, zero = weight.scale_and_zero[: inputs // group, :outputs].permute(2, 1, 0).contiguous()
            values = unpack_int4_tiles(weight.qdata)[:outputs, :inputs] - 8
            return pack_nibbles(values, group), scale, zero
    return None


def _fits(group: int, inputs: int) -> bool:
    return group >= 16 and group & (group - 1) == 0 and inputs % group == 0


def pack_nibbles(values: torch.Tensor, group: int) -> torch.Tensor:
    """(out, in) integers from -8 to 7 -> (out, in / 8) int32: word j of a group holds, from its lowest bits on, values
    j, j + group / 8, j + 2 · group / 8 and so on, each plus 8."""
    parts = (values.to(torch.int64) + 8).unflatten(-1, (-1, 8, group // 8))
    words = sum(parts[:, :, i] << 4 * i for i in range(8))
    assert isinstance(words, torch.Tensor)
    return (words - ((words >> 31) << 32)).to(torch.int32).flatten(1).contiguous()


def _agrees(module: nn.Linear, replacement: nn.Module) -> bool:
    """Whether the kernel gives what the layer gives, on a row and on several."""
    generator = torch.Generator().manual_seed(0)
    for rows in (1, MOST_ROWS):
        x = torch.randn(rows, module.in_features, generator=generator).to(
            module.weight.device, module.weight.dtype
        )
        with torch.no_grad():
            expected, found = module(x).float(), replacement(x).float()
        if not (expected - found).abs().max() <= _TOLERANCE * expected.abs().max():
            return False
    return True

"""Quantized Linears at the speed of plain ones, to the same bits.

torchao's kernels for CPUs (and most for GPUs) dequantize a weight at every call and then multiply. Where
that is the recipe's arithmetic, the dequantized weight is kept instead, so each call is the multiplication
alone. A module is replaced only after its replacement gave the same bits on probe inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

log = logging.getLogger(__name__)
_PROBE_ROWS = 5
# Half of what is free: activations and the other model of a pair need room too.
_SHARE = 0.5
# Products of two int8 values are below 2**14: so many of them sum exactly in float32.
_EXACT_TERMS = 1024


class Kept(nn.Module):
    """A Linear whose weight (out, in) was dequantized once; ``quantize`` is what its recipe does to
    activations."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantize: Callable[..., Any] | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.quantize = quantize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x if self.quantize is None else self.quantize(x), self.weight, self.bias)


class KeptByMatmul(Kept):
    """The same where torchao multiplies first and adds the bias afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.matmul(x, self.weight.t())
        return out if self.bias is None else out + self.bias


class KeptInt8(Kept):
    """int8 weights widened once; the scale (out,) multiplies the product, as torchao does it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor) -> None:
        super().__init__(weight, bias, None)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.mm(x.reshape(-1, x.shape[-1]), self.weight.t()) * self.scale
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class KeptInt8Dynamic(KeptInt8):
    """int8 activations times int8 weights, the integer product computed exactly in float32."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor,
        quantize: Callable[..., Any],
    ) -> None:
        super().__init__(weight, bias, scale)
        self.quantize = quantize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.quantize is not None
        values, scales = self.quantize(x)
        rows = values.reshape(-1, x.shape[-1]).float()
        parts = [
            torch.mm(a, b.t())
            for a, b in zip(rows.split(_EXACT_TERMS, 1), self.weight.split(_EXACT_TERMS, 1), strict=True)
        ]
        # Exact parts, added without rounding and rounded once, as the integer product is when it turns to
        # float.
        product = parts[0] if len(parts) == 1 else torch.stack(parts).double().sum(0).float()
        out = (product * scales.reshape(-1, 1)).to(x.dtype) * self.scale
        out = out.reshape(*x.shape[:-1], -1)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def keep_dequantized(model: Any) -> int:
    """Replace the quantized Linears of ``model`` that can be, while memory lasts; how many were."""
    found = [
        (name, m) for name, m in model.named_modules() if type(m) is nn.Linear and _is_quantized(m.weight)
    ]
    if not found:
        return 0
    device = found[0][1].weight.device
    room = _SHARE * free_bytes(device)
    kept = 0
    for name, module in found:
        size = module.weight.numel() * _element_size(model)
        if size > room:
            break
        replacement = _replacement(module)
        if replacement is None or not _same_bits(module, replacement):
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)
        room -= size
        kept += 1
    log.info(
        "%d of %d quantized Linears keep their dequantized weights (same bits, faster)", kept, len(found)
    )
    return kept


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device (for a CPU: that the system can give without swapping)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 << 30


def _is_quantized(weight: torch.Tensor) -> bool:
    from torchao.utils import TorchAOBaseTensor

    return isinstance(weight, TorchAOBaseTensor)


def _element_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.element_size())


def _replacement(module: nn.Linear) -> nn.Module | None:
    """A module that should compute what ``module`` does, or None for a kind of weight that is not known
    here."""
    weight: Any = module.weight
    match type(weight).__name__:
        case "IntxUnpackedToInt8Tensor":
            from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

            dynamic = weight.activation_quantization is not None
            quantize = intx._apply_int8_act_asym_per_token_quant_dequant if dynamic else None
            return Kept(weight.dequantize(), module.bias, quantize)
        case "NVFP4Tensor" if weight.act_quant_kwargs is None:
            return Kept(weight.dequantize(weight.orig_dtype), module.bias, None)
        case "Float8Tensor" if weight.act_quant_kwargs is None:
            return KeptByMatmul(weight.dequantize(), module.bias, None)
        case "Int8Tensor" if weight.act_pre_scale is None:
            return _int8(weight, module.bias)
    return None


def _int8(weight: Any, bias: torch.Tensor | None) -> nn.Module | None:
    if weight.block_size[-1] < weight.qdata.shape[-1]:
        return KeptByMatmul(weight.dequantize(), bias, None) if weight.act_quant_kwargs is None else None
    scale = weight.scale.to(weight.dtype).flatten()
    if weight.act_quant_kwargs is None:
        return KeptInt8(weight.qdata.to(weight.dtype), bias, scale)
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        # A GPU has an integer product of its own; in narrower types the sums would not be exact.
        return None
    from torchao.quantization.quantize_.common.quantize_tensor_kwargs import (
        _choose_quant_func_and_quantize_tensor as quantize_tensor,
    )

    kwargs, fixed_scale, fixed_zero = (
        weight.act_quant_kwargs,
        weight.act_quant_scale,
        weight.act_quant_zero_point,
    )
    if "ASYMMETRIC" in str(kwargs.mapping_type):
        return None

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = quantize_tensor(x, kwargs, scale=fixed_scale, zero_point=fixed_zero)
        return tensor.qdata, tensor.scale

    return KeptInt8Dynamic(weight.qdata.float(), bias, scale, quantize)


def _same_bits(module: nn.Module, replacement: nn.Module) -> bool:
    weight: Any = module.weight
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1, weight.shape[1]), (2, _PROBE_ROWS, weight.shape[1])):
        x = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
        with torch.inference_mode():
            if not torch.equal(module(x), replacement(x)):
                return False
    return True

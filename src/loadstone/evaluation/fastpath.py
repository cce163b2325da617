"""Linears at the speed of the machine: dequantized weights kept, and on some CPUs weights packed.

**Kept.** torchao's kernels for CPUs (and most for GPUs) dequantize a weight at every call and then
multiply. Where that is the recipe's arithmetic, the dequantized weight is kept instead, so each call is the
multiplication alone. A module is replaced only after its replacement gave the same bits on probe inputs.

**Packed.** In float32 on an AMD CPU torch multiplies with MKL, which leaves half of the machine unused
there; oneDNN's products over weights packed once are about twice as fast. They add in another order, so
results agree to float32 rounding (losses to 1e-6), not to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

log = logging.getLogger(__name__)
_PROBE_ROWS = 5
# Half of what is free: activations and the other model of a pair need room too.
_SHARE = 0.5
# Products of two int8 values are at most 2**14: so many of them sum exactly in float32.
_EXACT_TERMS = 1024
_PACKED_TOLERANCE = 1e-5
_CACHED_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class FastPath:
    """How many Linears were sped up: ``kept`` to the same bits, ``packed`` to float32 rounding."""

    kept: int = 0
    packed: int = 0


class Product(nn.Module):
    """x (..., in) times a weight (out, in), transposed."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)


class PackedProduct(nn.Module):
    """The same with a weight in oneDNN's own layout; float32 on a CPU only."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return result


class Kept(nn.Module):
    """A Linear whose weight was dequantized once; ``quantize`` is what its recipe does to activations."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantize: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.products = nn.ModuleList([Product(weight)])
        self.bias = bias
        self.quantize = quantize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.products[0](x if self.quantize is None else self.quantize(x), self.bias)


class KeptBiasLast(Kept):
    """The same where torchao adds the bias to the rounded product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.products[0](x)
        return out if self.bias is None else out + self.bias


class KeptInt8(Kept):
    """int8 weights widened once; the scale (out,) multiplies the product, as torchao does it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor) -> None:
        super().__init__(weight, bias)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.products[0](x) * self.scale
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
        super().__init__(weight[:0], bias, scale)
        self.quantize = quantize
        self.products = nn.ModuleList([Product(part.contiguous()) for part in weight.split(_EXACT_TERMS, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.quantize is not None
        values, scales = self.quantize(x)
        rows = values.reshape(-1, x.shape[-1]).float().split(_EXACT_TERMS, 1)
        parts = [product(part) for product, part in zip(self.products, rows, strict=True)]
        # Exact parts, added without rounding and rounded once, as the integer product is when it turns to
        # float.
        whole = parts[0] if len(parts) == 1 else torch.stack(parts).double().sum(0)
        out = (whole.to(scales.dtype) * scales.reshape(-1, 1)).to(x.dtype) * self.scale
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def speed_up(model: Any) -> FastPath:
    """Replace what can be replaced among the Linears of ``model``, in place, while memory lasts."""
    kept = _keep_dequantized(model)
    packed = _pack(model) if packs_here(model.get_input_embeddings().weight) else 0
    return FastPath(kept, packed)


@lru_cache(maxsize=1)
def _amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()[:2000]


@lru_cache(maxsize=1)
def _has_int8_products() -> bool:
    return bool(torch.cpu._is_vnni_supported())


def packs_here(weight: torch.Tensor) -> bool:
    """Whether packing pays for weights like this one. By the make of the CPU, never by a timing: results
    must not depend on how busy the machine was."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _amd()
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device (for a CPU: that the system can give without swapping)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 << 30


def _keep_dequantized(model: Any) -> int:
    found = [
        (name, m) for name, m in model.named_modules() if type(m) is nn.Linear and _is_quantized(m.weight)
    ]
    if not found:
        return 0
    room = _SHARE * free_bytes(found[0][1].weight.device)
    kept = 0
    for name, module in found:
        room -= module.weight.numel() * module.weight.element_size()
        if room < 0:
            break
        replacement = _replacement(module)
        if replacement is not None and _agree(module, replacement, exactly=True):
            model.set_submodule(name, replacement)
            kept += 1
    log.info(
        "%d of %d quantized Linears keep their dequantized weights (same bits, faster)", kept, len(found)
    )
    return kept


def _pack(model: Any) -> int:
    """Pack the weights of plain Linears and of what was kept; how many modules that are."""
    room = _SHARE * free_bytes(torch.device("cpu"))
    modules = dict(model.named_modules())
    rounding = any(_rounds_activations(m) for m in modules.values())
    head = model.get_output_embeddings()
    packed = 0
    for name, module in modules.items():
        exact = isinstance(modules[name.rpartition(".products")[0]], KeptInt8Dynamic)
        if rounding and not exact and module is not head:
            continue
        if type(module) is nn.Linear and not _is_quantized(module.weight):
            new: nn.Module = KeptPlain(module)
        elif isinstance(module, Product):
            new = PackedProduct(module.weight)
        else:
            continue
        room -= 4 * module.weight.numel()
        if room < 0:
            break
        if _agree(module, new, exactly=False):
            model.set_submodule(name, new)
            packed += 1
    return packed


def _rounds_activations(module: nn.Module) -> bool:
    if isinstance(module, Kept):
        return module.quantize is not None
    # A quantized Linear that was not replaced may do anything.
    return type(module) is nn.Linear and _is_quantized(module.weight)


class KeptPlain(nn.Module):
    """A plain Linear with a packed weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.product = PackedProduct(linear.weight)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.product(x, self.bias)
        return result


def _is_quantized(weight: torch.Tensor) -> bool:
    from torchao.utils import TorchAOBaseTensor

    return isinstance(weight, TorchAOBaseTensor)


def _replacement(module: nn.Linear) -> nn.Module | None:
    """A module that should compute what ``module`` does, or None for a kind of weight that is not known
    here."""
    weight: Any = module.weight
    match type(weight).__name__:
        case "IntxUnpackedToInt8Tensor":
            from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

            dynamic = weight.activation_quantization is not None
            quantize = intx._apply_int8_act_asym_per_token_quant_dequant if dynamic else None
            if dynamic and weight.device.type == "cpu":
                quantize = int8_round_trip
            return Kept(weight.dequantize(), module.bias, quantize)
        case "NVFP4Tensor" if weight.act_quant_kwargs is None:
            return Kept(weight.dequantize(weight.orig_dtype), module.bias)
        case "Float8Tensor" if weight.act_quant_kwargs is None:
            return KeptBiasLast(weight.dequantize(), module.bias)
        case "Int8Tensor" if weight.act_pre_scale is None:
            return _int8(weight, module.bias)
    return None


def int8_round_trip(x: torch.Tensor) -> torch.Tensor:
    """x (..., in) rounded to int8 per token, asymmetrically, and back: torchao's operations in torchao's
    order, in place and on a few rows at a time, so that they run out of the cache."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows)
    at_once = max(1, _CACHED_ELEMENTS // x.shape[-1])
    for some, rounded in zip(rows.split(at_once), out.split(at_once), strict=True):
        # Two reductions: `aminmax` is ten times slower than both.
        low, high = some.amin(-1, keepdim=True).clamp_(max=0), some.amax(-1, keepdim=True).clamp_(min=0)
        scale = ((high - low) / 255.0).clamp_(min=torch.finfo(x.dtype).smallest_normal)
        zero = (-128 - (low / scale).round_()).clamp_(-128, 127)
        torch.mul(some, 1.0 / scale, out=rounded)
        rounded.round_().add_(zero).clamp_(-128, 127).sub_(zero).mul_(scale)
    return out.reshape(x.shape)


def _int8(weight: Any, bias: torch.Tensor | None) -> nn.Module | None:
    if weight.block_size[-1] < weight.qdata.shape[-1]:
        return KeptBiasLast(weight.dequantize(), bias) if weight.act_quant_kwargs is None else None
    scale = weight.scale.to(weight.dtype).flatten()
    if weight.act_quant_kwargs is None:
        return KeptInt8(weight.qdata.to(weight.dtype), bias, scale)
    if weight.device.type != "cpu" or _has_int8_products():
        return None  # the device's own integer products are as exact, and faster
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


def _agree(module: Any, replacement: nn.Module, *, exactly: bool) -> bool:
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1, weight.shape[1]), (2, _PROBE_ROWS, weight.shape[1])):
        x = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
        with torch.inference_mode():
            expected, got = module(x), replacement(x)
        tolerance = 0.0 if exactly else _PACKED_TOLERANCE * float(expected.abs().max())
        if expected.shape != got.shape or not bool((expected - got).abs().max() <= tolerance):
            return False
    return True

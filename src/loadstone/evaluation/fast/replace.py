"""Replace Linear layers by faster ones with the same results: cached dequantized weights, repacked weights.

**Dequantized.** torchao's CPU kernels (and most of its GPU kernels) dequantize a weight at every call and then
multiply. Where that is the recipe's arithmetic, the dequantized weight is cached, so that each call is the
multiplication alone. A module is replaced only if its replacement gives the same bits on probe inputs.

**Repacked.** In float32 on an AMD CPU torch multiplies with MKL, which leaves half of the machine unused
there; oneDNN's products over weights packed once are about twice as fast. They add in another order, so
results agree to float32 rounding (losses to 1e-6), not to the bit. Where activations are rounded to integers,
sums are added in MKL's order, to the same bits. On a GPU tinygemm's int4 kernel is made for a few tokens; its
dequantized weight, multiplied by cuBLAS, is fifteen times as fast on many, to bfloat16 rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loadstone.evaluation.fast.products import (
    DequantizedLinear,
    DequantizedLinearBfloat16,
    DequantizedLinearBiasLast,
    Float8DynamicLinear,
    Int8DynamicLinear,
    Int8LinearCuda,
    Int8LinearFloat32,
    Int8LinearVnni,
    Int8WeightLinear,
    PackedLinear,
    PackedProduct,
    PackedProductInOrder,
    Product,
    Rounding,
)
from loadstone.evaluation.measure import free_bytes
from loadstone.loading.input_rounding import (
    float8_rounding,
    int8_round_trip,
    int8_rows,
    mx_round_trip,
    share_rounding,
)
from loadstone.quantization.weight_use import weights_used_otherwise

log = logging.getLogger(__name__)
# Rows of the probes: more than the 16 that some integer kernels ask for, a single one, and many.
_PROBES = ((1, 1), (2, 9))
_MANY = ((2, 9), (1, 300))
# Share of free memory to use: activations and the other model of a pair need the rest.
_SHARE = 0.5
# Largest difference of a product whose sum was reordered, relative to its largest element.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
_EYE_ROWS = 1024


@dataclass(frozen=True)
class FastPath:
    """How many Linear layers were replaced. ``dequantized``: their weight is cached dequantized, with the same bits as
    before. ``repacked``: another kernel multiplies, to rounding."""

    dequantized: int = 0
    repacked: int = 0

    def __add__(self, other: FastPath) -> FastPath:
        return FastPath(self.dequantized + other.dequantized, self.repacked + other.repacked)


def speed_up(model: Any, *, pack: bool = True) -> FastPath:
    """Replace the Linear layers of ``model`` in place, as many as memory allows.

    ``pack``: also those whose weights are packed where that pays. Compiled layers cannot have them: inductor takes no
    tensor in oneDNN's layout, and packs weights itself.
    """
    packs = pack and packs_here(model.get_input_embeddings().weight)
    head = model.get_output_embeddings() if packs else None
    fast, found = _speed_up(model, head, weights_used_otherwise(model), packs=packs)
    if found:
        log.info("caching dequantized weights of %d/%d quantized Linear layers", fast.dequantized, found)
    return fast


def speed_up_layer(layer: Any, read: Collection[str], *, like: torch.Tensor) -> FastPath:
    """The same for one decoder layer, of a model whose other weights have the device and dtype of ``like``. ``read``:
    the layer's modules whose weights the model uses otherwise (`weights_used_otherwise` of the whole model)."""
    return _speed_up(layer, None, read, packs=packs_here(like))[0]


def _speed_up(
    model: Any, head: nn.Module | None, read: Collection[str], *, packs: bool
) -> tuple[FastPath, int]:
    exact, rounded, found = _cache_dequantized(model, read)
    share_rounding(model, (DequantizedLinear, Int8DynamicLinear, Float8DynamicLinear))
    packed = _pack(model, head, read) if packs else 0
    _unwrap(model)
    return FastPath(exact, rounded + packed), found


@lru_cache(maxsize=1)
def _amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()[:2000]


@lru_cache(maxsize=1)
def _has_int8_products() -> bool:
    return bool(torch.cpu._is_vnni_supported())


def packs_here(weight: torch.Tensor) -> bool:
    """Whether packing pays for weights like this one. Decided by the vendor of the CPU, never by a timing: results must
    not depend on how busy the machine is."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _amd()
    )


def _cache_dequantized(model: Any, read: Collection[str]) -> tuple[int, int, int]:
    """Replace quantized Linear layers. Returns how many give the same bits, how many agree to rounding, and how many
    there are."""
    found = [
        (name, m)
        for name, m in model.named_modules()
        if type(m) is nn.Linear and _is_quantized(m.weight) and name not in read
    ]
    if not found:
        return 0, 0, 0
    room = _SHARE * free_bytes(found[0][1].weight.device)
    same = rounded = 0
    for name, module in found:
        room -= module.weight.numel() * module.weight.element_size()
        if room < 0:
            break
        replacement = _replacement(module)
        exactly = not isinstance(replacement, DequantizedLinearBfloat16)
        if replacement is not None and _agree(module, replacement, exactly=exactly):
            model.set_submodule(name, replacement)
            same += exactly
            rounded += not exactly
    return same, rounded, len(found)


def _unwrap(model: Any) -> None:
    """Turn replacements that are plain products into `nn.Linear`: two more modules per call take half the time of a
    small model that generates one token at a time."""
    for name, module in list(model.named_modules()):
        plain = type(module) is DequantizedLinear or (
            type(module) is DequantizedLinearBiasLast and module.bias is None
        )
        if not plain or module.rounding is not None or type(module.products[0]) is not Product:
            continue
        weight = module.products[0].weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight, linear.bias = weight, module.bias
        model.set_submodule(name, linear)


def _pack(model: Any, head: nn.Module | None, read: Collection[str]) -> int:
    """Pack the weights of plain and of dequantized Linear layers. Returns how many layers that are."""
    room = _SHARE * free_bytes(torch.device("cpu"))
    modules = dict(model.named_modules())
    rounding = any(_rounds_activations(m) for m in modules.values())
    packed = set()
    for name, module in modules.items():
        plain = type(module) is nn.Linear and not _is_quantized(module.weight) and name not in read
        if (not plain and not isinstance(module, Product)) or module.weight.device.type == "meta":
            continue
        room -= 4 * module.weight.numel()
        if room < 0:
            break
        owner = name if plain else name.rpartition(".products")[0]
        # Integers that float32 holds exactly may be added in any order, and no activations are rounded after the head.
        in_order = rounding and module is not head and not isinstance(modules[owner], Int8LinearFloat32)
        product = PackedProductInOrder if in_order else PackedProduct
        new = PackedLinear(module, product) if plain else product(module.weight)
        # One row alone takes another way through MKL; batches have more.
        if _agree(module, new, exactly=in_order, probes=_MANY if in_order else _PROBES):
            model.set_submodule(name, new)
            packed.add(owner)
    return len(packed)


def _rounds_activations(module: nn.Module) -> bool:
    if isinstance(module, DequantizedLinear):
        return module.rounding is not None
    # A quantized Linear that was not replaced may do anything.
    return isinstance(module, Int8DynamicLinear | Float8DynamicLinear) or (
        type(module) is nn.Linear and _is_quantized(module.weight)
    )


def _is_quantized(weight: torch.Tensor) -> bool:
    from torchao.utils import TorchAOBaseTensor

    return isinstance(weight, TorchAOBaseTensor)


def _replacement(module: nn.Linear) -> nn.Module | None:
    """A faster module for the same computation, or None for a type of weight without one."""
    weight: Any = module.weight
    match type(weight).__name__:
        case "IntxUnpackedToInt8Tensor":
            from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

            dynamic = weight.activation_quantization is not None
            rounding: Rounding | None = None
            if dynamic:
                on_cpu = weight.device.type == "cpu"
                rounding = int8_round_trip if on_cpu else intx._apply_int8_act_asym_per_token_quant_dequant
            return DequantizedLinear(weight.dequantize(), module.bias, rounding)
        case "NVFP4Tensor" if weight.act_quant_kwargs is None:
            return DequantizedLinear(weight.dequantize(weight.orig_dtype), module.bias)
        case "MXTensor" if str(weight.kernel_preference).endswith("EMULATED"):
            return _microscaled(weight, module.bias)
        case "Float8Tensor" if weight.act_quant_kwargs is None:
            return DequantizedLinearBiasLast(weight.dequantize(), module.bias)
        case "Float8Tensor" if weight.device.type == "cuda":
            how = weight.act_quant_kwargs
            parts = (how.float8_dtype, how.granularity, how.mm_config, how.hp_value_lb, how.hp_value_ub)
            return Float8DynamicLinear(
                module.weight, module.bias, float8_rounding(*parts, how.kernel_preference)
            )
        case "Int8Tensor" if weight.act_pre_scale is None:
            return _int8(weight, module.bias)
        case "Int4TilePackedTo4dTensor" if weight.act_pre_scale is None and weight.dim() == 2:
            return DequantizedLinearBfloat16(_from_tiles(weight), module.bias)
    return None


def _microscaled(weight: Any, bias: torch.Tensor | None) -> nn.Module | None:
    """MX formats that this device cannot multiply: torchao dequantizes both sides and multiplies."""
    how = weight.act_quant_kwargs
    if how is None or not str(how.kernel_preference).endswith("EMULATED"):
        return None
    rounding = mx_round_trip(how.elem_dtype, how.block_size, how.scaling_mode)
    return DequantizedLinear(weight.dequantize(weight.orig_dtype), bias, rounding)


def _from_tiles(weight: Any) -> torch.Tensor:
    """The bfloat16 weight (out, in) that tinygemm's kernel multiplies by, read from its products with rows of the
    identity."""
    out_features, in_features = weight.shape
    group = weight.block_size[-1]
    padded = weight.scale_and_zero.shape[0] * group
    result = torch.empty(out_features, in_features, dtype=torch.bfloat16, device=weight.device)
    for at in range(0, in_features, _EYE_ROWS):
        end = min(at + _EYE_ROWS, in_features)
        eye = torch.zeros(end - at, padded, dtype=torch.bfloat16, device=weight.device)
        eye[:, at:end].fill_diagonal_(1)
        columns = torch.ops.aten._weight_int4pack_mm(eye, weight.qdata, group, weight.scale_and_zero)
        result[:, at:end] = columns[:, :out_features].t()
    return result


def _int8(weight: Any, bias: torch.Tensor | None) -> nn.Module | None:
    if weight.block_size[-1] < weight.qdata.shape[-1]:
        return (
            DequantizedLinearBiasLast(weight.dequantize(), bias) if weight.act_quant_kwargs is None else None
        )
    if weight.act_quant_kwargs is None:
        return Int8WeightLinear(weight.qdata.to(weight.dtype), bias, weight.scale.to(weight.dtype).flatten())
    if "ASYMMETRIC" in str(weight.act_quant_kwargs.mapping_type):
        return None
    return _integer_module(weight)(weight.qdata, bias, weight.scale.flatten(), _int8_rounding(weight))


def _integer_module(weight: Any) -> type[Int8DynamicLinear]:
    """The fastest exact integer product on the weight's device."""
    if weight.device.type == "cuda":
        # cuBLAS's conditions; torchao multiplies on the CPU where they do not hold.
        return Int8LinearCuda if all(size % 8 == 0 for size in weight.shape) else Int8LinearFloat32
    return Int8LinearVnni if _has_int8_products() else Int8LinearFloat32


def _int8_rounding(weight: Any) -> Rounding:
    from torchao.quantization.quantize_.common.quantize_tensor_kwargs import (
        _choose_quant_func_and_quantize_tensor as quantize_tensor,
    )

    how, scale, zero = weight.act_quant_kwargs, weight.act_quant_scale, weight.act_quant_zero_point
    if scale is None and type(how.granularity).__name__ == "PerRow" and not how.reduce_range:
        return int8_rows

    def rounding(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = quantize_tensor(x, how, scale=scale, zero_point=zero)
        return tensor.qdata, tensor.scale

    return rounding


def _agree(
    module: Any, replacement: nn.Module, *, exactly: bool, probes: tuple[tuple[int, int], ...] = _PROBES
) -> bool:
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    for leading in probes:
        x = torch.randn((*leading, weight.shape[1]), generator=generator).to(weight.device, weight.dtype)
        with torch.no_grad():
            expected = module(x)
            try:
                got = replacement(x)
            except (RuntimeError, NotImplementedError):
                # A kernel that this version of torch lacks.
                return False
        tolerance = 0.0 if exactly else _TOLERANCE[weight.dtype] * float(expected.abs().max())
        if expected.shape != got.shape or not bool((expected - got).abs().max() <= tolerance):
            return False
    return True

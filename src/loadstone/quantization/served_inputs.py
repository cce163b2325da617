"""Inputs of layers rounded as vLLM 0.32 rounds them before a product with quantized weights, and back.

Scales are float32, one for each token (a row of the input), group, or layer. The formulas are those of vLLM's
``QuantFP8.forward_native``, ``ref_nvfp4_quant``, ``_mxfp8_e4m3_quantize_torch`` and its int8 and MXFP4 kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadstone.artifact.compressed_tensors import LayerScheme, QuantArgs
from loadstone.artifact.compressed_tensors.scheme import MXFP4, MXFP8
from loadstone.quantization.packing import round_e2m1

if TYPE_CHECKING:
    import torch

_E4M3_MAX = 448.0
# vLLM's smallest scale of float8 inputs.
_SMALLEST = 1 / (_E4M3_MAX * 512)
_TINY = 2.0**-126


def describe_inputs(scheme: LayerScheme) -> str:
    """How inputs are rounded, in a few words; empty where they are not, or in a way that is not known here."""
    inputs = scheme.inputs
    if inputs is None:
        return ""
    if inputs.type == "float" and inputs.bits == 4 and inputs.grouped:
        if inputs.group_size == 16:
            return "NVFP4 in groups of 16, by the stored scale of the layer"
        return "MXFP4 in groups of 32"
    if inputs.type == "float" and inputs.bits == 8 and _is_mx(scheme, inputs):
        return "MXFP8 in groups of 32"
    if inputs.bits != 8 or inputs.dynamic == "local":
        return ""
    kind = "FP8" if inputs.type == "float" else "int8"
    bound = "448" if inputs.type == "float" else "127" if inputs.symmetric else "255, with a zero point"
    if inputs.dynamic:
        return f"{kind} {_sharing(inputs)}, scale = largest / {bound}" if _sharing(inputs) else ""
    return f"{kind} by the stored scale of the layer" if inputs.strategy == "tensor" else ""


def round_inputs(
    x: torch.Tensor, scheme: LayerScheme, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """``x`` (…, in) rounded and back, in its own dtype, for a scheme that `describe_inputs` knows.

    ``scale``, ``zero``: the stored ones (one number each) of a scheme that has them; of NVFP4 the global scale.
    """
    import torch

    inputs, width = scheme.inputs, x.shape[-1]
    assert inputs is not None
    size = inputs.group_size or width if inputs.grouped else width
    # A last group that the input does not fill is filled up with zeros.
    groups = torch.nn.functional.pad(x.float(), (0, -width % size)).unflatten(-1, (-1, size))
    if inputs.type == "int":
        found = _round_int8(groups, inputs, scale, zero)
    elif inputs.bits == 4:
        found = _round_nvfp4(groups, scale) if inputs.group_size == 16 else _round_mxfp4(groups)
    elif _is_mx(scheme, inputs):
        found = _round_mxfp8(groups)
    else:
        found = _round_float8(groups, inputs, scale)
    return found.flatten(-2)[..., :width].to(x.dtype)


def _is_mx(scheme: LayerScheme, inputs: QuantArgs) -> bool:
    return scheme.format in (MXFP8, MXFP4) and inputs.grouped and inputs.group_size == 32


def _sharing(inputs: QuantArgs) -> str:
    """What shares a computed scale. vLLM takes one a token also where the config says one a tensor."""
    if inputs.grouped:
        return f"in groups of {inputs.group_size}"
    return "per token" if inputs.strategy in ("token", "tensor") else ""


def _largest(groups: torch.Tensor) -> torch.Tensor:
    return groups.abs().amax(-1, keepdim=True)


def _round_float8(groups: torch.Tensor, inputs: QuantArgs, scale: torch.Tensor | None) -> torch.Tensor:
    import torch

    step = (_largest(groups) / _E4M3_MAX).clamp(min=_SMALLEST) if scale is None else scale.float().reshape(())
    # A group is divided by its scale, a whole token multiplied by the reciprocal: as vLLM does it.
    scaled = groups / step if inputs.grouped else groups * step.reciprocal()
    return scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float() * step


def _round_int8(
    groups: torch.Tensor, inputs: QuantArgs, scale: torch.Tensor | None, zero: torch.Tensor | None
) -> torch.Tensor:
    import torch

    if scale is not None:
        step, shift = scale.float().reshape(()), 0 if zero is None else zero.float().reshape(())
        return ((groups / step + shift).round().clamp(-128, 127) - shift) * step
    if inputs.symmetric:
        amax = _largest(groups)
        factor = torch.where(amax == 0, 0, 127 / amax)
        return (groups * factor).round().clamp(-128, 127) * (amax / 127)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 255).clamp(min=_TINY)
    shift = (-128 - low / step).round()
    return (((groups / step).round() + shift).clamp(-128, 127) - shift) * step


def _round_nvfp4(groups: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    import torch

    assert scale is not None
    whole = scale.float().reshape(())
    block = (whole * (_largest(groups) * (1 / 6.0))).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
    factor = torch.where(block == 0, 0, 1 / (block * (1 / whole)))
    return round_e2m1((groups * factor).clamp(-6, 6), ties_to_even=True) * (block / whole)


def _round_mxfp8(groups: torch.Tensor) -> torch.Tensor:
    import torch

    step = torch.exp2(torch.log2(_largest(groups).clamp(min=_TINY) / _E4M3_MAX).ceil().clamp(-127, 127))
    return (groups / step).to(torch.float8_e4m3fn).float() * step


def _round_mxfp4(groups: torch.Tensor) -> torch.Tensor:
    import torch

    # The nearest power of two with e2m1's one bit of mantissa, over the largest power in e2m1 (4).
    bits = (_largest(groups).view(torch.int32) + 0x200000) & 0x7F800000
    power = bits.view(torch.float32).clamp(min=_TINY)
    step = torch.exp2((torch.log2(power).floor() - 2).clamp(-127, 127))
    return round_e2m1(groups / step, ties_to_even=True) * step

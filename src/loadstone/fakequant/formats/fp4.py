"""NVFP4 and OCP microscaling, bit for bit as NVIDIA ModelOpt's storage classes (``NVFP4QTensor``,
``MXFP4QTensor``, ``MXFP8QTensor``): their rounding at ties and of tiny blocks differs from the CUDA
kernels' (docs/export-fakequant.md).
"""

from __future__ import annotations

import torch

from loadstone.quantization.packing import round_e2m1

_E4M3_MAX = 448.0


def _over(x: torch.Tensor, value: float) -> torch.Tensor:
    """``x / value``, with one result everywhere: CUDA multiplies by the reciprocal of a Python number."""
    return x / torch.tensor(value, dtype=x.dtype, device=x.device)


def _log2(x: torch.Tensor) -> torch.Tensor:
    """The float32 nearest to the logarithm: devices differ in the last bit of float32's own, and so above a
    power of two in the exponent."""
    return torch.log2(x.double()).float()


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """``2**exponent`` of whole numbers, exact on every device."""
    return torch.exp2(exponent.double()).float()


def fold_nvfp4(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Float32 ``x`` (…, width), width a multiple of 16, with the tensor-wide ``amax`` (a scalar tensor)."""
    if not bool(amax > 0):
        return torch.zeros_like(x)
    whole = _over(amax, 6.0 * _E4M3_MAX)
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    scale = blocks.abs().amax(-1, keepdim=True) / (6.0 * whole)
    scale = scale.masked_fill(scale == 0, 1.0).clamp(2.0**-9, _E4M3_MAX)
    step = scale.to(torch.float8_e4m3fn).to(torch.float32) * whole
    return (round_e2m1(blocks / step, ties_to_even=True) * step).reshape(x.shape)


def fold_mxfp4(x: torch.Tensor) -> torch.Tensor:
    """Float32 ``x`` (…, width), width a multiple of 32."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = _power(_log2(_over(blocks.abs().amax(-1, keepdim=True), 6.0)).clamp(min=-127.0).ceil())
    return (round_e2m1(blocks / scale, ties_to_even=False) * scale).reshape(x.shape)


def fold_mxfp8(x: torch.Tensor) -> torch.Tensor:
    """Float32 ``x`` (…, width); a last partial block of 32 is padded with 0."""
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -width % 32))
    blocks = padded.reshape(*padded.shape[:-1], -1, 32)
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = _log2(_over(amax, _E4M3_MAX)).ceil().clamp(-127.0, 127.0)
    scaled = (blocks * _power(-exponent)).clamp(-_E4M3_MAX, _E4M3_MAX)
    folded = scaled.to(torch.float8_e4m3fn).to(torch.float32) * _power(exponent)
    return folded.reshape(padded.shape)[..., :width]

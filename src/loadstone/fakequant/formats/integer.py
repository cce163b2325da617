"""Symmetric integer rounding, bit for bit as NVIDIA ModelOpt's CPU path (``tensor_quant._tensor_quant``)."""

from __future__ import annotations

import torch

# Below the smallest number of float16, where ModelOpt takes a block for zeros.
_TINY = 2.0**-24


def fold_blocks(x: torch.Tensor, bits: int, amax: torch.Tensor) -> torch.Tensor:
    """Round float32 ``x`` to ``bits``-bit integers times ``amax / (2**(bits-1) - 1)``; ``amax``
    broadcasts."""
    # A tensor over a tensor: the same quotient from a Python float differs in the last bit.
    bound = torch.tensor(2.0 ** (bits - 1) - 1.0, dtype=x.dtype, device=x.device)
    scale = bound / amax
    zero = amax <= _TINY
    quantized = torch.clamp((x * scale.masked_fill(zero, 0.0)).round_(), -bound - 1, bound)
    return quantized / scale.masked_fill(zero, 1.0)


def fold_rows(x: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Float32 ``x`` (rows, width) with one scale a row (``block`` 0) or a block of a row, the last
    padded with 0."""
    if not block:
        return fold_blocks(x, bits, x.abs().amax(-1, keepdim=True))
    rows, width = x.shape
    padded = torch.nn.functional.pad(x, (0, -width % block)).reshape(-1, block)
    return fold_blocks(padded, bits, padded.abs().amax(-1, keepdim=True)).reshape(rows, -1)[:, :width]

"""FP8 (e4m3) rounding, bit for bit as NVIDIA ModelOpt's eager path (``tensor_quant._fp8_eager``)."""

from __future__ import annotations

import torch

_MAX = 448.0
_TINY = 2.0**-24


def fold_scaled(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Round float32 ``x`` to e4m3 after scaling ``amax`` (broadcasts) to 448."""
    scale = _MAX / torch.where(amax <= _TINY, torch.ones_like(amax), amax)
    # Multiplied by the reciprocal, as the reference does: a division differs in the last bit.
    inverse = 1 / scale
    return (x * scale).clamp(-_MAX, _MAX).to(torch.float8_e4m3fn).to(torch.float32) * inverse


def fold_rows(x: torch.Tensor) -> torch.Tensor:
    """Float32 ``x`` (…, width) with one scale a row."""
    return fold_scaled(x, x.abs().amax(-1, keepdim=True))


def fold_squares(x: torch.Tensor, block: int) -> torch.Tensor:
    """Float32 ``x`` (rows, width) with one scale a square of ``block``, edges padded with 0."""
    rows, width = x.shape
    padded = torch.nn.functional.pad(x, (0, -width % block, 0, -rows % block))
    squares = padded.reshape(padded.shape[0] // block, block, -1, block)
    return fold_scaled(squares, squares.abs().amax((1, 3), keepdim=True)).reshape(padded.shape)[:rows, :width]

"""How rows become tokens: the part of a fitted context that is neither weights nor keys and values.

Normalisation is computed in float64 whatever the model's dtype, so that a column such as a timestamp (large offset,
small spread) keeps its information; what the transformer sees is the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Beyond this many standard deviations values grow with their logarithm only (identity inside, C1 at the seam).
SOFT_CLIP = 4.0


@dataclass(frozen=True)
class Scaler:
    """Per-feature affine map to zero mean and unit spread; ``mean`` and ``std`` are float64, (..., 1, d)."""

    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., n, d) -> the same in units of the training rows' spread, softly clipped; NaN stays NaN."""
        return soft_clip((x.double() - self.mean) / self.std)


def fit_scaler(x: Tensor) -> Scaler:
    """Scaler of training rows (..., n, d). NaN is skipped; a constant or empty column gets a spread of 1."""
    x = x.double()
    present = ~x.isnan()
    count = present.sum(-2, keepdim=True).clamp(min=1)
    filled = torch.where(present, x, 0.0)
    mean = filled.sum(-2, keepdim=True) / count
    spread = torch.where(present, filled - mean, 0.0).square().sum(-2, keepdim=True) / count
    # sqrt has an infinite slope at 0: gradients into the context pass through the safe branch only.
    varies = spread > 1e-20 * mean.square() + 1e-300
    std = torch.where(varies, torch.where(varies, spread, 1.0).sqrt(), 1.0)
    return Scaler(mean, std)


def soft_clip(z: Tensor) -> Tensor:
    """Identity within ±`SOFT_CLIP`, logarithmic growth beyond."""
    sign = z.detach().sign()
    excess = (z * sign - SOFT_CLIP).clamp(min=0)
    # hardtanh and not clamp: its slope is one kernel on a GPU, and is 0 at the seam, where the excess has one.
    return torch.addcmul(F.hardtanh(z, -SOFT_CLIP, SOFT_CLIP), sign, excess.log1p())


def cells(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Scaled values (..., n, d) -> (..., n, d, 2): the value (0 where missing) and whether it is missing."""
    missing = z.isnan()
    return torch.stack((torch.where(missing, 0.0, z), missing.to(z.dtype)), -1).to(dtype)


def feature_codes(features: int, size: int, seed: int) -> Tensor:
    """Random codes that tell columns apart, float32 (features, size), drawn on the CPU so a seed means one value."""
    return torch.randn(features, size, generator=torch.Generator().manual_seed(seed))

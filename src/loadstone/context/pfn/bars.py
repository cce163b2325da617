"""The Riemann (bar) distribution: a histogram over fixed borders whose two outer bars are half-normal tails.

From Müller et al., "Transformers can do Bayesian inference" (ICLR 2022), appendix E. Everything is closed form in
float64. A tail is anchored at its bar's inner border and holds half its mass within the bar's width, so the support
is the whole line; averaging the outer bars at their midpoints instead costs most of the accuracy of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Half of a half-normal's mass lies below this many scales.
_HALF_MASS = 0.6744897501960817
_MEAN = math.sqrt(2 / math.pi)
_VARIANCE = 1 - 2 / math.pi


@dataclass(frozen=True, eq=False)
class BarPosterior:
    """Predictive distributions over the target, one for each query: ``logits`` (..., bars), any floating dtype.

    ``borders`` (bars + 1), float64 and increasing, are in the target's own units. Results are float64 in those units
    and differentiable with respect to the logits.
    """

    logits: Tensor
    borders: Tensor

    @cached_property
    def log_mass(self) -> Tensor:
        """Log probability of each bar, (..., bars)."""
        return self.logits.double().log_softmax(-1)

    @property
    def mass(self) -> Tensor:
        return self.log_mass.exp()

    @cached_property
    def widths(self) -> Tensor:
        return self.borders.diff()

    @cached_property
    def tail_scales(self) -> tuple[Tensor, Tensor]:
        """Scales of the left and right half-normal tails: of the first and the last bar."""
        low, high = (self.widths[:: len(self.widths) - 1] / _HALF_MASS).unbind()
        return low, high

    def mirrored(self) -> BarPosterior:
        """The distribution of minus the target."""
        return BarPosterior(self.logits.flip(-1), -self.borders.flip(-1))

    def _bar_means(self) -> Tensor:
        low, high = self.tail_scales
        inner = (self.borders[1:-2] + self.borders[2:-1]) / 2
        ends = self.borders[1] - low * _MEAN, self.borders[-2] + high * _MEAN
        return torch.cat((ends[0].view(1), inner, ends[1].view(1)))

    @property
    def mean(self) -> Tensor:
        """(...)."""
        return (self.mass * self._bar_means()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """(...)."""
        low, high = self.tail_scales
        within = torch.cat(
            ((low**2 * _VARIANCE).view(1), self.widths[1:-1] ** 2 / 12, (high**2 * _VARIANCE).view(1))
        )
        means = self._bar_means()
        return (self.mass * (within + (means - self.mean.unsqueeze(-1)).square())).sum(-1)

    @property
    def std(self) -> Tensor:
        return self.variance.sqrt()

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density at ``y``, which broadcasts against (...)."""
        y = y.double()
        y, _ = torch.broadcast_tensors(y, self.log_mass[..., 0])
        y = y.contiguous()
        bar = torch.searchsorted(self.borders[1:-1].contiguous(), y.detach(), right=True)
        log_mass = self.log_mass.expand(*y.shape, -1).gather(-1, bar.unsqueeze(-1)).squeeze(-1)
        low, high = self.tail_scales
        density = -self.widths.log()[bar]
        density = torch.where(bar == 0, _log_half_normal((self.borders[1] - y) / low, low), density)
        last = len(self.widths) - 1
        density = torch.where(bar == last, _log_half_normal((y - self.borders[-2]) / high, high), density)
        return log_mass + density

    def cdf(self, y: Tensor) -> Tensor:
        """P(target <= y); ``y`` broadcasts against (...)."""
        y = as_double(y, self.borders.device).unsqueeze(-1)
        low, high = self.tail_scales
        inner = ((y - self.borders[1:-2]) / self.widths[1:-1]).clamp(0, 1)
        left = 2 * torch.special.ndtr(((y - self.borders[1]) / low).clamp(max=0))
        right = 2 * torch.special.ndtr(((y - self.borders[-2]) / high).clamp(min=0)) - 1
        return (self.mass * torch.cat((left, inner, right), -1)).sum(-1)

    def quantile(self, q: Tensor | float) -> Tensor:
        """Inverse of `cdf` for probabilities ``q`` in (0, 1), which broadcast against (...)."""
        mass = self.mass
        level, _ = torch.broadcast_tensors(as_double(q, mass.device), mass[..., 0])
        cumulative = mass.cumsum(-1).expand(*level.shape, -1)
        bar = torch.searchsorted(cumulative.detach().contiguous(), level.detach().unsqueeze(-1).contiguous())
        bar = bar.clamp(max=mass.shape[-1] - 1)
        own = mass.expand(*level.shape, -1).gather(-1, bar).squeeze(-1)
        before = cumulative.gather(-1, bar).squeeze(-1) - own
        bar = bar.squeeze(-1)
        # Within its bar, kept off 0 and 1 where a tail's quantile is infinite.
        share = ((level - before) / own.clamp(min=1e-300)).clamp(1e-12, 1 - 1e-12)
        low, high = self.tail_scales
        y = self.borders[bar] + share * self.widths[bar]
        y = torch.where(bar == 0, self.borders[1] + low * torch.special.ndtri(share / 2), y)
        return torch.where(
            bar == mass.shape[-1] - 1, self.borders[-2] + high * torch.special.ndtri((1 + share) / 2), y
        )

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` independent draws for each query, (count, ...); drawn on the generator's device (CPU)."""
        uniform = torch.rand(count, *self.logits.shape[:-1], dtype=torch.float64, generator=generator)
        return self.quantile(uniform.to(self.logits.device))

    def expected_excess(self, threshold: Tensor | float) -> Tensor:
        """E[max(target - threshold, 0)] within each bar, (..., bars); ``threshold`` broadcasts against (...)."""
        best = as_double(threshold, self.borders.device).unsqueeze(-1)
        a, b = self.borders[1:-2], self.borders[2:-1]
        # Clamping the threshold to the bar makes one formula of the three cases (below, inside, above).
        c = best.clamp(a, b)
        inner = ((b + c) / 2 - best) * (b - c) / (b - a)
        low, high = self.tail_scales
        below, above = (self.borders[1] - best) / low, (best - self.borders[-2]) / high
        # E[max(|Z| - t, 0)] of a standard normal Z for t >= 0, of both tails at once.
        t = torch.cat((below, above), -1).clamp(min=0)
        beyond = (t.square() * -0.5).exp() * _MEAN - t * torch.special.erfc(t / math.sqrt(2))
        left = low * (t[..., :1] - _MEAN + beyond[..., :1])
        right = high * (beyond[..., 1:] - above.clamp(max=0))
        return torch.cat((left, inner, right), -1)

    def integrate(self, on_bar: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sum over bars of their mass times ``on_bar(lower, upper)``: the discretized form of BoTorch's Riemann
        posteriors, which takes the outer bars as bounded."""
        return (self.mass * on_bar(self.borders[:-1], self.borders[1:])).sum(-1)


def as_double(number: Tensor | float, device: torch.device) -> Tensor:
    """A number or tensor as float64 on ``device``; a number is not copied there, which would wait for the GPU."""
    if isinstance(number, Tensor):
        return number.to(device, torch.float64)
    return torch.full((), number, dtype=torch.float64, device=device)


def log_tail_excess(t: Tensor) -> Tensor:
    """log E[max(|Z| - t, 0)] of a standard normal Z for t >= 0, without underflow or cancellation."""
    short = t.clamp(max=100.0)
    near = 1 - short * (math.sqrt(math.pi / 2) * torch.special.erfcx(short / math.sqrt(2)))
    far = t.clamp(min=100.0) ** -2
    ratio = torch.where(t < 100, near, far * (1 - far * (3 - 15 * far)))
    return ratio.log() - t.square() * 0.5 + math.log(_MEAN)


def _log_half_normal(z: Tensor, scale: Tensor) -> Tensor:
    return math.log(2) - z.square() / 2 - math.log(math.sqrt(2 * math.pi)) - scale.log()

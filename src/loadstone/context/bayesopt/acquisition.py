"""Acquisition functions in closed form on the bar distribution. All take a posterior (...) and return (...), float64.

``best`` is the incumbent in the target's units. ``maximize=False`` looks for small targets. A higher value is always
the better candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loadstone.context.pfn.bars import BarPosterior, as_double, log_tail_excess


def ei(posterior: BarPosterior, best: Tensor | float, *, maximize: bool = True) -> Tensor:
    """Expected improvement over ``best``."""
    posterior, best = _oriented(posterior, best, maximize)
    return (posterior.mass * posterior.expected_excess(best)).sum(-1)


def log_ei(posterior: BarPosterior, best: Tensor | float, *, maximize: bool = True) -> Tensor:
    """Logarithm of `ei`, finite and with a useful gradient where the improvement itself underflows.

    The right tail has mass everywhere, so the sum over bars always has a term to keep (cf. Ament et al., "Unexpected
    improvements to expected improvement", NeurIPS 2023).
    """
    posterior, best = _oriented(posterior, best, maximize)
    excess = posterior.expected_excess(best)
    positive = excess > 0
    log_excess = torch.where(positive, torch.where(positive, excess, 1.0).log(), -torch.inf)
    threshold = as_double(best, posterior.borders.device)
    scale = posterior.tail_scales[1]
    t = (threshold - posterior.borders[-2]) / scale
    tail = torch.where(t > 0, scale.log() + log_tail_excess(t.clamp(min=0)), log_excess[..., -1])
    return (posterior.log_mass + torch.cat((log_excess[..., :-1], tail.unsqueeze(-1)), -1)).logsumexp(-1)


def pi(posterior: BarPosterior, best: Tensor | float, *, maximize: bool = True) -> Tensor:
    """Probability of improving on ``best``."""
    posterior, best = _oriented(posterior, best, maximize)
    # The mirrored distribution function is accurate where 1 - cdf would cancel.
    return posterior.mirrored().cdf(-as_double(best, posterior.borders.device))


def ucb(posterior: BarPosterior, beta: float = 2.0, *, maximize: bool = True) -> Tensor:
    """Mean plus sqrt(``beta``) standard deviations (BoTorch's convention); of minus the target when minimizing."""
    posterior, _ = _oriented(posterior, 0.0, maximize)
    return posterior.mean + beta**0.5 * posterior.std


def quantile(posterior: BarPosterior, q: float, *, maximize: bool = True) -> Tensor:
    """The ``q``-quantile (0.9 is optimistic), of minus the target when minimizing."""
    posterior, _ = _oriented(posterior, 0.0, maximize)
    return posterior.quantile(q)


def thompson(
    posterior: BarPosterior, *, maximize: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """One draw for each query, independent between queries: take the candidate with the highest."""
    posterior, _ = _oriented(posterior, 0.0, maximize)
    return posterior.sample(1, generator)[0]


def discretized_ei(posterior: BarPosterior, best: Tensor | float, *, maximize: bool = True) -> Tensor:
    """`ei` as BoTorch's ``DiscretizedExpectedImprovement`` computes it: the outer bars are uniform, not tails."""
    posterior, best = _oriented(posterior, best, maximize)
    limit = as_double(best, posterior.borders.device).unsqueeze(-1)

    def on_bar(low: Tensor, high: Tensor) -> Tensor:
        start = torch.minimum(torch.maximum(limit, low), high)
        return ((high + start) / 2 - limit) * (high - start) / (high - low)

    return posterior.integrate(on_bar)


def discretized_pi(posterior: BarPosterior, best: Tensor | float, *, maximize: bool = True) -> Tensor:
    """`pi` as BoTorch's ``DiscretizedProbabilityOfImprovement`` computes it."""
    posterior, best = _oriented(posterior, best, maximize)
    limit = as_double(best, posterior.borders.device).unsqueeze(-1)
    return posterior.integrate(lambda low, high: ((high - limit) / (high - low)).clamp(0, 1))


def _oriented(
    posterior: BarPosterior, best: Tensor | float, maximize: bool
) -> tuple[BarPosterior, Tensor | float]:
    return (posterior, best) if maximize else (posterior.mirrored(), -best)

"""Closed forms against numeric integration and against draws."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from loadstone.context.bayesopt import acquisition
from loadstone.context.pfn.bars import BarPosterior, log_tail_excess

BORDERS = torch.tensor([-4.0, -2.5, -1.0, -0.3, 0.0, 0.4, 1.5, 2.0, 5.0], dtype=torch.float64)


@pytest.fixture
def posterior() -> BarPosterior:
    torch.manual_seed(3)
    return BarPosterior(2 * torch.randn(5, 8, dtype=torch.float64), BORDERS)


def integral(posterior: BarPosterior, value: object) -> torch.Tensor:
    """Trapezoids of ``value(y)`` times the density, bar by bar so that no jump lies inside one."""
    edges = torch.cat((torch.tensor([-60.0, -12.0]), BORDERS[1:-1], torch.tensor([12.0, 60.0]))).double()
    total = torch.zeros(len(posterior.logits), dtype=torch.float64)
    for low, high in pairwise(edges):
        y = torch.linspace(float(low) + 1e-12, float(high) - 1e-12, 20_001, dtype=torch.float64)
        density = posterior.log_prob(y.unsqueeze(-1)).exp().T
        total += torch.trapezoid(density * value(y), y, dim=-1)  # type: ignore[operator]
    return total


def test_density_moments_and_distribution(posterior: BarPosterior) -> None:
    close = torch.testing.assert_close
    close(integral(posterior, torch.ones_like), torch.ones(5).double(), rtol=0, atol=1e-7)
    close(integral(posterior, lambda y: y), posterior.mean, rtol=0, atol=1e-6)
    second = integral(posterior, lambda y: y.square())
    close(second - posterior.mean**2, posterior.variance, rtol=1e-6, atol=0)
    for at in (-3.0, -1.0, 0.2, 1.9, 4.4):
        close(integral(posterior, lambda y, at=at: (y <= at).double()), posterior.cdf(at), rtol=0, atol=2e-3)
    q = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
    y = posterior.quantile(q.unsqueeze(-1))
    close(posterior.cdf(y), q.unsqueeze(-1).expand(-1, 5), rtol=0, atol=1e-9)


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("best", [-5.5, -3.0, -1.0, 0.1, 1.7, 2.0, 3.3, 9.0])
def test_acquisitions_are_integrals(posterior: BarPosterior, best: float, maximize: bool) -> None:
    sign = 1 if maximize else -1
    excess = integral(posterior, lambda y: (sign * (y - best)).clamp(min=0))
    ei = acquisition.ei(posterior, best, maximize=maximize)
    torch.testing.assert_close(ei, excess, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(
        acquisition.log_ei(posterior, best, maximize=maximize), ei.log(), rtol=0, atol=1e-9
    )
    share = integral(posterior, lambda y: (sign * (y - best) > 0).double())
    torch.testing.assert_close(acquisition.pi(posterior, best, maximize=maximize), share, rtol=0, atol=3e-3)
    expected = sign * posterior.mean + 3**0.5 * posterior.std
    torch.testing.assert_close(acquisition.ucb(posterior, 3.0, maximize=maximize), expected)


def test_log_ei_where_ei_underflows(posterior: BarPosterior) -> None:
    logits = posterior.logits.clone().requires_grad_()
    far = BarPosterior(logits, BORDERS)
    assert (acquisition.ei(far, 400.0) == 0).all()
    value = acquisition.log_ei(far, 400.0)
    value.sum().backward()
    assert value.isfinite().all() and (value < -1000).all()
    assert logits.grad.isfinite().all() and logits.grad.abs().max() > 0
    t = torch.tensor([0.0, 0.5, 3.0, 20.0, 99.9, 100.1, 1e4], dtype=torch.float64)
    assert (log_tail_excess(t).diff() < 0).all()
    # 2 (pdf(3) - 3 Q(3)), to ten digits.
    assert abs(log_tail_excess(t)[2].exp().item() - 7.643086e-4) < 1e-9


def test_gradients_at_the_borders() -> None:
    logits = torch.zeros(len(BORDERS), 8, dtype=torch.float64, requires_grad=True)
    best = BORDERS.clone().requires_grad_()
    posterior = BarPosterior(logits, BORDERS)
    for name in ("ei", "log_ei", "pi"):
        value = getattr(acquisition, name)(posterior, best)
        gradients = torch.autograd.grad(value.sum(), (logits, best), retain_graph=True)
        assert all(g.isfinite().all() for g in gradients), name
    # Equal bars: multiples of 1/8 are the borders themselves.
    q = torch.arange(1, 9, dtype=torch.float64).clamp(max=7.999).div(8).unsqueeze(-1)
    (gradient,) = torch.autograd.grad(posterior.quantile(q).sum(), logits)
    assert gradient.isfinite().all()


def test_samples_follow_the_distribution(posterior: BarPosterior) -> None:
    draws = posterior.sample(40_000, torch.Generator().manual_seed(0))
    assert draws.shape == (40_000, 5)
    torch.testing.assert_close(draws.mean(0), posterior.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(draws.std(0), posterior.std, rtol=0.03, atol=0)
    generator = torch.Generator().manual_seed(0)
    drawn = acquisition.thompson(posterior, maximize=False, generator=generator)
    assert drawn.shape == (5,)


def test_discretized_forms_are_bounded(posterior: BarPosterior) -> None:
    """As BoTorch's: uniform outer bars. Equal to the exact form where the tails hold nothing."""
    logits = posterior.logits.clone()
    logits[:, [0, -1]] = -80
    inner = BarPosterior(logits, BORDERS)
    for best in (-1.2, 0.2, 1.9):
        torch.testing.assert_close(acquisition.discretized_ei(inner, best), acquisition.ei(inner, best))
        torch.testing.assert_close(acquisition.discretized_pi(inner, best), acquisition.pi(inner, best))
    assert (acquisition.discretized_ei(posterior, 5.0) == 0).all() and (
        acquisition.ei(posterior, 5.0) > 0
    ).all()

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

botorch = pytest.importorskip("botorch")
from botorch.optim import optimize_acqf  # noqa: E402
from botorch_community.acquisition.discretized import (  # noqa: E402
    DiscretizedExpectedImprovement,
    DiscretizedProbabilityOfImprovement,
)
from tests.context.conftest import random_pfn  # noqa: E402

from loadstone.context.bayesopt.acquisition import discretized_ei, discretized_pi, log_ei  # noqa: E402
from loadstone.context.bayesopt.botorch import BarAcquisition, ContextModel  # noqa: E402
from loadstone.context.pfn.bars import BarPosterior  # noqa: E402
from loadstone.context.pfn.model import PFN  # noqa: E402
from loadstone.context.tables.predictions import REGRESSION  # noqa: E402

Rows = Callable[..., tuple[Tensor, Tensor]]
BOX = torch.stack((torch.zeros(3), torch.ones(3))).double()


@pytest.fixture
def base() -> PFN:
    return random_pfn(layers=2).double()


@pytest.fixture
def model(base: PFN, rows: Rows) -> ContextModel:
    x, y = rows(12, 3, torch.float64)
    return ContextModel(base, x, y.unsqueeze(-1))


def improvement(model: ContextModel) -> Callable[[BarPosterior], Tensor]:
    return lambda posterior: log_ei(posterior, model.train_Y.max())


class Uncached(ContextModel):
    """The same numbers by the plain path: every restart carries the training set."""

    def posterior(self, X: Tensor, **kwargs: object) -> object:  # type: ignore[override]
        from loadstone.context.bayesopt.botorch import ContextPosterior

        context = self.context()
        many = X.reshape(-1, X.shape[-2], X.shape[-1])
        train = self.train_X.expand(len(many), -1, -1), self.train_Y[:, 0].expand(len(many), -1)
        logits = self.base(*train, many, REGRESSION, context.codes)
        return ContextPosterior(BarPosterior(logits.view(*X.shape[:-1], -1), context.borders))


def test_same_candidate_with_and_without_the_cache(base: PFN, model: ContextModel) -> None:
    found = []
    for kind in (ContextModel, Uncached):
        torch.manual_seed(1)
        other = kind(base, model.train_X, model.train_Y)
        options = {"num_restarts": 4, "raw_samples": 16, "options": {"maxiter": 20, "seed": 3}}
        found.append(optimize_acqf(BarAcquisition(other, improvement(other)), BOX, q=1, **options)[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_batches_may_shrink(model: ContextModel) -> None:
    sizes: list[int] = []

    def value(posterior: BarPosterior) -> Tensor:
        sizes.append(len(posterior.logits))
        return log_ei(posterior, model.train_Y.max())

    optimize_acqf(
        BarAcquisition(model, value), BOX, q=1, num_restarts=6, raw_samples=16, options={"maxiter": 30}
    )
    assert max(sizes) == 16 and len(set(sizes)) >= 2
    assert len(model._contexts) == 1


def test_pending_points_are_a_new_prefill(model: ContextModel) -> None:
    x = torch.rand(5, 1, 3, dtype=torch.float64)
    acquisition = BarAcquisition(model, improvement(model))
    alone = acquisition(x)
    acquisition.set_X_pending(torch.rand(2, 3, dtype=torch.float64))
    together = acquisition(x)
    assert model.context(acquisition.X_pending).rows == 14 and not torch.equal(alone, together)
    acquisition.set_X_pending(None)
    assert torch.equal(acquisition(x), alone)
    candidates, _ = optimize_acqf(
        acquisition, BOX, q=3, num_restarts=2, raw_samples=8, sequential=True, options={"maxiter": 5}
    )
    assert candidates.shape == (3, 3) and len({tuple(c.tolist()) for c in candidates}) == 3


def test_botorchs_discretized_acquisitions(model: ContextModel) -> None:
    """With pending points and minimisation too: both raise for the models that come with BoTorch's PFNs."""
    x, best = torch.rand(4, 1, 3, dtype=torch.float64), model.train_Y.max()
    bars = model.posterior(x).bars
    expected = discretized_ei(bars, best).squeeze(-1), discretized_pi(bars, best).squeeze(-1)
    ei = DiscretizedExpectedImprovement(model, best_f=best)
    torch.testing.assert_close(ei(x), expected[0])
    torch.testing.assert_close(DiscretizedProbabilityOfImprovement(model, best_f=best)(x), expected[1])
    ei.set_X_pending(torch.rand(1, 3, dtype=torch.float64))
    assert ei(x).isfinite().all()
    assert model.posterior(x, negate_train_ys=True).mean.shape == (4, 1, 1)


def test_posterior_is_botorchs(model: ContextModel) -> None:
    x = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    posterior = model.posterior(x)
    assert posterior.mean.shape == posterior.variance.shape == (2, 4, 1)
    draws = posterior.rsample(torch.Size([4000]))
    assert draws.shape == (4000, 2, 4, 1)
    error = (draws.mean(0) - posterior.mean).abs() / posterior.variance.sqrt()
    assert error.max() < 0.1
    draws.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    more = model.condition_on_observations(torch.rand(2, 3), torch.rand(2, 1))
    assert more.context().rows == 14

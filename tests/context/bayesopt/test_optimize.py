from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loadstone.context.bayesopt import acquisition
from loadstone.context.bayesopt.optimize import optimize_acquisition
from loadstone.context.pfn.bars import BarPosterior
from loadstone.context.pfn.model import PFN
from loadstone.context.tables.predictions import REGRESSION
from loadstone.errors import UsageError

BOX = torch.tensor([[-1.0, -2.0], [2.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
def test_finds_maxima_inside_and_on_the_box(method: str) -> None:
    def valley(x: Tensor) -> Tensor:
        return -((1 - x[:, 0]) ** 2 + 30 * (x[:, 1] - x[:, 0] ** 2) ** 2)

    found = optimize_acquisition(valley, BOX, restarts=8, raw_samples=64, steps=200, method=method)
    torch.testing.assert_close(found.x, torch.ones(2).double(), rtol=0, atol=0.05)
    corner = optimize_acquisition(lambda x: x[:, 0] - x[:, 1], BOX, restarts=4, raw_samples=16, method=method)
    torch.testing.assert_close(corner.x, torch.tensor([2.0, -2.0]).double())


def test_converged_restarts_are_left_out() -> None:
    sizes: list[int] = []

    def bowl(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return -(x - 0.3).square().sum(-1)

    found = optimize_acquisition(bowl, BOX, restarts=16, raw_samples=32)
    assert found.value > -1e-10 and min(sizes) < 16 and found.evaluations == sum(sizes)


def test_same_candidate_with_and_without_the_cache(
    pfn: PFN, rows: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    model = pfn.double()
    try:
        x, y = rows(12, 3, torch.float64)
        context = model.fit(x, y)

        def uncached(queries: Tensor) -> Tensor:
            many = len(queries)
            train = x.expand(many, -1, -1), y.expand(many, -1)
            logits = model(*train, queries.unsqueeze(1), REGRESSION, context.codes).squeeze(1)
            return acquisition.log_ei(BarPosterior(logits, context.borders), y.max())

        box = torch.stack((torch.zeros(3), torch.ones(3))).double()
        options = {"restarts": 4, "raw_samples": 16, "steps": 15, "seed": 5}
        cached = optimize_acquisition(
            lambda q: acquisition.log_ei(context.posterior(q), y.max()), box, **options
        )  # type: ignore[arg-type]
        plain = optimize_acquisition(uncached, box, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(cached.x, plain.x, rtol=0, atol=1e-7)
        again = optimize_acquisition(
            lambda q: acquisition.log_ei(context.posterior(q), y.max()), box, **options
        )  # type: ignore[arg-type]
        assert torch.equal(cached.x, again.x)
    finally:
        pfn.float()


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="lower below upper"):
        optimize_acquisition(lambda x: x.sum(-1), BOX.flip(0))
    with pytest.raises(UsageError, match="lbfgs, adam"):
        optimize_acquisition(lambda x: x.sum(-1), BOX, method="newton")


def test_values_that_are_not_finite_never_win() -> None:
    found = optimize_acquisition(
        lambda x: torch.where(x[:, 0] > 0.5, torch.nan, x[:, 0]), BOX, restarts=8, raw_samples=64
    )
    assert found.value <= 0.5

"""Every speed-up gives the numbers of the plain path: cached, folded, chunked, permuted, in threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.context.conftest import random_pfn
from torch import Tensor

from loadstone.context.pfn.model import PFN
from loadstone.context.tables.predictions import CLASSIFICATION, REGRESSION

Rows = Callable[..., tuple[Tensor, Tensor]]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def plain(model: PFN, x: Tensor, y: Tensor, queries: Tensor, codes: Tensor, task: str = REGRESSION) -> Tensor:
    """Every restart carries the training set: (restarts, q, d) -> logits."""
    restarts = len(queries)
    return model(x.expand(restarts, -1, -1), y.expand(restarts, -1), queries, task, codes)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [6, 100])
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("restarts", [1, 4, 32])
def test_cached_is_plain(rows: Rows, restarts: int, q: int, d: int, dtype: torch.dtype) -> None:
    model = random_pfn(layers=2, width=16, hidden=16, heads=2).to(dtype)
    x, y = rows(12, d, dtype)
    queries = torch.rand(restarts, q, d, dtype=dtype, generator=torch.Generator().manual_seed(1))
    with model.cache_training_context(x, y) as context:
        one, other = queries.clone().requires_grad_(), queries.clone().requires_grad_()
        cached, uncached = context.logits(one), plain(model, x, y, other, context.codes)
        torch.testing.assert_close(cached, uncached, rtol=0, atol=TOLERANCE[dtype])
        chunked = context.logits(queries, memory_budget=1)
        torch.testing.assert_close(chunked, uncached.detach(), rtol=0, atol=TOLERANCE[dtype])
        weights = torch.randn(cached.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
        (cached * weights).sum().backward()
        (uncached * weights).sum().backward()
        scale = other.grad.abs().max()
        torch.testing.assert_close(one.grad / scale, other.grad / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("per_feature", [True, False])
@pytest.mark.parametrize("task", [REGRESSION, CLASSIFICATION])
def test_both_kinds_of_tokens_and_tasks(rows: Rows, task: str, per_feature: bool) -> None:
    model = random_pfn(per_feature=per_feature, max_features=8).double()
    x, y = rows(15, 6, torch.float64)
    if task == CLASSIFICATION:
        y = (y * 3).long() % 3
    x[2, 3] = torch.nan
    queries = torch.rand(4, 2, 6, dtype=torch.float64)
    queries[1, 1, 0] = torch.nan
    context = model.fit(x, y)
    uncached = plain(model, x, y, queries, context.codes, task)
    if task == CLASSIFICATION:
        uncached = uncached[..., : len(context.classes)]
    torch.testing.assert_close(context.logits(queries), uncached, rtol=0, atol=1e-10)


def test_gradcheck(rows: Rows) -> None:
    context = random_pfn(layers=2, width=16, hidden=16, heads=2).double().fit(*rows(5, 2, torch.float64))
    queries = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(context.logits, queries)
    assert torch.autograd.gradcheck(lambda x: context.logits(x, memory_budget=1), queries)


def test_gradients_into_the_context(rows: Rows) -> None:
    model = random_pfn(layers=2, width=16, hidden=16, heads=2).double()
    x, y = rows(5, 2, torch.float64)
    queries = torch.rand(2, 2, dtype=torch.float64)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: model.fit(a, b, grad_context=True).logits(queries), (x, y))
    assert not model.fit(x, y).layers[0].keys.requires_grad


def test_prefill_in_chunks_is_prefill(pfn: PFN, rows: Rows) -> None:
    x, y = rows(33, 6)
    whole, parts = pfn.fit(x, y), pfn.fit(x, y, memory_budget=1)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-5)


def test_order_and_company_do_not_matter(rows: Rows) -> None:
    model = random_pfn().double()
    x, y = rows(20, 6, torch.float64)
    queries = torch.rand(8, 6, dtype=torch.float64)
    expected = model.fit(x, y).logits(queries)
    shuffled = torch.randperm(20)
    torch.testing.assert_close(
        model.fit(x[shuffled], y[shuffled]).logits(queries), expected, rtol=0, atol=1e-10
    )
    regrouped = model.fit(x, y).logits(queries.flip(0).view(2, 2, 2, 6)).view(8, -1).flip(0)
    torch.testing.assert_close(regrouped, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.fit(x, y).logits(queries[3]), expected[3], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "drift"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_smaller_caches_drift_little(pfn: PFN, rows: Rows, dtype: str, drift: float) -> None:
    x, y = rows(40, 6)
    full, small = pfn.fit(x, y), pfn.fit(x, y, cache_dtype=dtype)
    queries = torch.rand(16, 6)
    assert (
        0
        < (full.logits(queries) - small.logits(queries)).abs().max()
        < drift * full.logits(queries).abs().max()
    )
    assert small.nbytes < full.nbytes * {"bfloat16": 0.55, "int8": 0.45}[dtype]
    queries.requires_grad_()
    small.logits(queries).sum().backward()
    assert queries.grad.abs().max() > 0


def test_contexts_are_independent(pfn: PFN, rows: Rows) -> None:
    """Nested, after an exception, and under every gradient mode of the caller."""
    x, y = rows(10, 3)
    queries = torch.rand(4, 3)
    expected = pfn.fit(x, y).logits(queries)
    before = dict(pfn.state_dict())
    with pytest.raises(ValueError, match="stop"), pfn.cache_training_context(x, y):
        raise ValueError("stop")
    with pfn.cache_training_context(x, y) as outer, pfn.cache_training_context(x[:4], y[:4]) as inner:
        assert torch.equal(outer.logits(queries), expected)
        assert not torch.equal(inner.logits(queries), expected)
        assert torch.equal(outer.logits(queries), expected)
    with torch.inference_mode():
        made = pfn.fit(x * 1, y * 1)
        assert torch.equal(made.logits(queries), expected)
    # Made under inference mode, and still good for gradients outside of it.
    leaf = queries.clone().requires_grad_()
    made.logits(leaf).sum().backward()
    assert leaf.grad.isfinite().all()
    assert list(pfn.state_dict()) == list(before)


def test_twenty_threads(pfn: PFN, rows: Rows) -> None:
    context = pfn.fit(*rows(12, 4))
    queries = torch.rand(20, 5, 4)
    expected = [context.logits(part) for part in queries]

    def ask(part: Tensor) -> Tensor:
        leaf = part.clone().requires_grad_()
        context.logits(leaf).sum().backward()
        return context.logits(part)

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, [*queries] * 3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 3, strict=True))


@pytest.mark.parametrize("task", [REGRESSION, CLASSIFICATION])
def test_degenerate_tables(pfn: PFN, task: str) -> None:
    one = torch.tensor([[1.0, 5.0, torch.nan]])
    y = torch.tensor([3.0]) if task == REGRESSION else torch.tensor([7])
    context = pfn.fit(one, y)
    queries = torch.tensor([[1.0, 5.0, 2.0], [torch.nan] * 3, [1e30, -1e30, 0.0]], requires_grad=True)
    logits = context.logits(queries)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert queries.grad.isfinite().all()
    if task == CLASSIFICATION:
        assert context.classes == (7,) and torch.equal(
            context.probabilities(queries), torch.ones(3, 1).double()
        )
    else:
        posterior = context.posterior(queries)
        assert posterior.mean.isfinite().all() and (posterior.variance > 0).all()


def test_units_do_not_matter(pfn: PFN, rows: Rows) -> None:
    """A timestamp in nanoseconds keeps its information; the posterior follows the target's units."""
    x, y = rows(20, 3, torch.float64)
    queries = torch.rand(5, 3, dtype=torch.float64)
    plain, scaled = pfn.fit(x, y), pfn.fit(1.7e18 + 1e12 * x, 1e6 + 1e3 * y)
    torch.testing.assert_close(
        scaled.logits(1.7e18 + 1e12 * queries), plain.logits(queries), rtol=0, atol=2e-3
    )
    mean = scaled.posterior(1.7e18 + 1e12 * queries).mean
    torch.testing.assert_close(mean, 1e6 + 1e3 * plain.posterior(queries).mean, rtol=1e-5, atol=0)

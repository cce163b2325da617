"""A captured evaluation gives the numbers of the plain one, bit for bit, or is not used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.context.conftest import random_pfn
from torch import Tensor

from loadstone.context.bayesopt import ei, log_ei, optimize_acquisition, pi, quantile, thompson, ucb
from loadstone.context.pfn.captured import CapturedGradient, CapturedValue

Rows = Callable[..., tuple[Tensor, Tensor]]
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


def plain(function: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.clone().requires_grad_()
    values = function(rows)
    values.sum().backward()
    assert rows.grad is not None
    return values.detach(), rows.grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("name", ["ei", "log_ei", "pi", "ucb", "quantile"])
@pytest.mark.parametrize("d", [6, 40])
def test_equals_plain(rows: Rows, name: str, d: int, device: str) -> None:
    x, y = (t.to(device) for t in rows(20, d))
    context = random_pfn(layers=2).to(device).fit(x, y)
    best = y.max().item()
    acquisition = {
        "ei": lambda p: ei(p, best),
        "log_ei": lambda p: log_ei(p, best),
        "pi": lambda p: pi(p, best),
        "ucb": ucb,
        "quantile": lambda p: quantile(p, 0.9),
    }[name]

    def function(queries: Tensor) -> Tensor:
        return acquisition(context.posterior(queries))

    captured = CapturedGradient(function)
    for count in (1, 32, 128):
        for _ in range(4):
            queries = torch.rand(count, d, device=device)
            for one, other in zip(captured(queries), plain(function, queries), strict=True):
                assert torch.equal(one, other)
    assert len([g for g in captured._graphs.values() if g is not None]) == (3 if device == "cuda" else 0)
    # As a part of a larger graph of autograd.
    queries, same = torch.rand(32, d, device=device), None
    for way in (function, lambda q: CapturedValue.apply(q, captured)):
        leaf = queries.clone().requires_grad_()
        (way(leaf) * torch.arange(32, device=device)).sum().backward()
        assert leaf.grad is not None
        if same is not None:
            torch.testing.assert_close(leaf.grad, same, rtol=1e-5, atol=1e-6 * same.abs().max().item())
        same = leaf.grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("kind", ["random on the host", "random on the GPU", "asks the host", "raises"])
def test_what_cannot_be_captured_is_called(rows: Rows, kind: str) -> None:
    x, y = (t.cuda() for t in rows(20, 3))
    context = random_pfn(layers=2).cuda().fit(x, y)
    calls: list[int] = []

    def function(queries: Tensor) -> Tensor:
        calls.append(len(queries))
        posterior = context.posterior(queries)
        if kind == "random on the host":
            return thompson(posterior)
        if kind == "random on the GPU":
            return posterior.mean + torch.rand(len(queries), device="cuda")
        if kind == "raises" and len(calls) == 3:
            raise RuntimeError("the function's own")
        return posterior.mean * (1 if posterior.mean.sum().item() < 1e9 else 2)

    captured = CapturedGradient(function)
    queries = torch.rand(8, 3, device="cuda")
    results = [captured(queries) for _ in range(4)]
    assert all(g is None for g in captured._graphs.values())
    if kind not in ("random on the host", "random on the GPU"):
        assert all(torch.equal(values, results[0][0]) for values, _ in results)
    # Neither the generators nor the stream are left in the middle of a capture.
    assert (
        torch.rand(3, device="cuda").isfinite().all() and torch.randn(2, 2, device="cuda").sum().item() < 1e9
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("method", ["lbfgs", "adam"])
def test_optimize(rows: Rows, method: str) -> None:
    """The graph is used, and finds what the CPU finds."""
    x, y = rows(20, 3)
    found = {}
    for device in ("cpu", "cuda"):
        context = random_pfn(layers=2).to(device).fit(x.to(device), y.to(device))
        calls: list[int] = []

        def acquisition(queries: Tensor, context: object = context, calls: list[int] = calls) -> Tensor:
            calls.append(len(queries))
            return log_ei(context.posterior(queries), 0.5)  # type: ignore[attr-defined]

        box = torch.tensor([[0.0] * 3, [1.0] * 3], device=device)
        found[device] = optimize_acquisition(acquisition, box, restarts=8, raw_samples=64, method=method)
        if device == "cuda":
            assert len(calls) < 8, "the function itself is called a few times only"
    assert found["cuda"].value == pytest.approx(found["cpu"].value, rel=1e-3)

"""On a GPU: the same numbers as on a CPU, and contexts that travel between the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.context.conftest import random_pfn, write_pfn
from torch import Tensor

from loadstone.context import load_context
from loadstone.context.tables.predictions import CLASSIFICATION, REGRESSION

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
Rows = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize("cache", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("task", [REGRESSION, CLASSIFICATION])
@pytest.mark.parametrize("made", ["cpu", "cuda"])
@pytest.mark.parametrize("used", ["cpu", "cuda"])
def test_device_pairs(rows: Rows, tmp_path: Path, made: str, used: str, task: str, cache: str | None) -> None:
    base = write_pfn(random_pfn(), tmp_path / "base")
    x, y = rows(30, 6)
    if task == CLASSIFICATION:
        y = (y > y.median()).long()
    context = random_pfn().to(made).fit(x, y, cache_dtype=cache)
    context.save(tmp_path / "fitted")
    loaded = load_context(tmp_path / "fitted", base=base, device=used)
    assert loaded.device.type == used and {t.device.type for t in loaded.tensors().values()} == {used}
    queries = torch.rand(7, 6)
    expected, found = context.logits(queries.to(made)).cpu(), loaded.logits(queries.to(used)).cpu()
    if made == used:
        assert torch.equal(expected, found)
    else:
        torch.testing.assert_close(expected, found, rtol=0, atol=1e-4)
    loaded.save(tmp_path / "again")
    again = load_context(tmp_path / "again", base=loaded.model)
    assert torch.equal(again.logits(queries.to(used)).cpu(), found)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("d", [6, 100])
@pytest.mark.parametrize(("restarts", "q"), [(1, 1), (4, 3), (32, 3)])
def test_cached_is_plain(
    rows: Rows, restarts: int, q: int, d: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = random_pfn(layers=2).to("cuda", dtype)
    x, y = (t.cuda() for t in rows(20, d, dtype))
    queries = torch.rand(restarts, q, d, dtype=dtype, device="cuda")
    one, other = queries.clone().requires_grad_(), queries.clone().requires_grad_()
    context = model.fit(x, y)
    cached = context.logits(one)
    plain = model(x.expand(restarts, -1, -1), y.expand(restarts, -1), other, REGRESSION, context.codes)
    scale = plain.detach().abs().max().clamp(min=1).item()
    torch.testing.assert_close(cached / scale, plain / scale, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        context.logits(queries, memory_budget=1), cached.detach(), rtol=0, atol=tolerance * scale
    )
    cached.square().sum().backward()
    plain.square().sum().backward()
    scale = other.grad.abs().max()
    torch.testing.assert_close(one.grad / scale, other.grad / scale, rtol=0, atol=10 * tolerance)


def test_more_rows_than_a_kernel_grid(rows: Rows) -> None:
    context = random_pfn(layers=2).cuda().fit(*rows(10, 2))
    queries = torch.rand(70_000, 2, device="cuda")
    found = context.logits(queries)
    torch.testing.assert_close(found[-5:], context.logits(queries[-5:]), rtol=0, atol=1e-4)

"""Training rows as numpy arrays, and tables without rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.context.conftest import random_pfn

from loadstone.context.pfn.encoding import soft_clip
from loadstone.context.tables.predictions import read_queries
from loadstone.context.tables.table import read_table
from loadstone.errors import ArtifactError


def test_numpy_arrays_are_training_rows() -> None:
    model = random_pfn(layers=2, width=16, hidden=16, heads=2)
    x, y = torch.rand(12, 3), torch.rand(12)
    queries = torch.rand(1, 4, 3)
    context = model.cache_training_context(x, y)
    with context as expected, model.cache_training_context(x.double().numpy(), y.double().numpy()) as found:
        assert torch.equal(found.logits(queries), expected.logits(queries))


def test_a_table_of_a_header_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b,y\n")
    assert list(read_table(tmp_path / "a.csv").columns) == ["a", "b", "y"]
    with pytest.raises(ArtifactError, match="a header and no rows"):
        read_queries(tmp_path / "a.csv", {"columns": {}, "names": [], "target": "y"}, measure=False)


def test_values_far_away_are_softened_with_one_slope_at_the_seam() -> None:
    z = torch.tensor([-1e6, -4.0, -1.0, 0.0, 4.0, 5.0, float("nan")], dtype=torch.float64, requires_grad=True)
    found = soft_clip(z)
    (slopes,) = torch.autograd.grad(found[:6].sum(), z)
    expected = torch.tensor([-4 - math.log(1e6 - 3), -4, -1, 0, 4, 4 + math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(found[:6].detach(), expected)
    assert found[6].isnan()
    assert slopes.tolist() == pytest.approx([1 / (1e6 - 3), 1, 1, 1, 1, 0.5, 0])

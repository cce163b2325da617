"""Whether a tensor in memory is finite, told from bit patterns."""

import pytest
import torch

from loadstone.artifact.values import surely_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_surely_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for values in ([most, -most, 0.0, -0.0], [-1.0, -most], [1.0, most]):
        assert surely_finite(torch.tensor(values, dtype=dtype))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for rest in (0.0, 1.0, -1.0, most, -most):
            found = torch.tensor([rest, bad], dtype=dtype)
            assert not surely_finite(found) and not surely_finite(-found)
    smallest = torch.finfo(dtype).smallest_normal
    assert surely_finite(torch.tensor([smallest, most], dtype=dtype), positive=True)
    for low in (0.0, -0.0, -1.0, torch.nan):
        assert not surely_finite(torch.tensor([low, 1.0], dtype=dtype), positive=True)


def test_what_takes_a_closer_look() -> None:
    assert not surely_finite(torch.ones(2, dtype=torch.float8_e4m3fn)) and not surely_finite(
        torch.ones(2).int()
    )

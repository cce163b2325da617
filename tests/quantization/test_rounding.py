"""Our plain rounding holds to torchao's, bit for bit, on weights that try every branch of it."""

import pytest
import torch
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quant_primitives import MappingType

from loadstone.quantization import rounding
from loadstone.quantization.rounding import plain_weight
from loadstone.quantization.schemes import IntxWeightOnly


def weights(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(96, 128, generator=generator)
    rows[:16] = rows[:16].abs()
    rows[16:32] *= torch.logspace(-44, 4, 16)[:, None]
    rows[32] = 0
    rows[33, ::2] = -0.0
    # Halves between two integers, where rounding to even shows.
    rows[34:48] = torch.randint(-15, 16, (14, 128), generator=generator) / 2
    rows[48] = torch.finfo(dtype).max / 2
    rows[49, 3] = -torch.finfo(dtype).max / 4
    return rows.to(dtype)


@pytest.mark.parametrize("mapping", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_weight_is_torchaos(dtype: torch.dtype, bits: int, group: int, mapping: str) -> None:
    weight = weights(dtype)
    ours = plain_weight(weight, IntxWeightOnly(bits, group, mapping))  # type: ignore[arg-type]
    theirs = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, group or 128),
        getattr(torch, f"int{bits}"),
        mapping_type=MappingType[mapping.upper()],
    )
    for part in ("qdata", "scale", "zero_point"):
        mine, his = getattr(ours, part), getattr(theirs, part)
        assert (mine.dtype, mine.shape) == (his.dtype, his.shape), part
        assert torch.equal(mine.view(torch.uint8), his.view(torch.uint8)), part


@pytest.mark.parametrize("mapping", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shares_tried_at_once_give_the_scales_of_one_by_one(
    dtype: torch.dtype, mapping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = IntxWeightOnly(bits=3, group_size=32, mapping=mapping)
    for importance in (None, torch.arange(1.0, 129.0)):
        alone = rounding.least_squares_scales(weights(dtype), scheme, importance)
        for count in (7, 45):
            with monkeypatch.context() as patch:
                patch.setattr(rounding, "_shares_at_once", lambda weight, count=count: count)
                together = rounding.least_squares_scales(weights(dtype), scheme, importance)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))

"""Kernels for few rows give torchao's products, and are used where that was seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.small_models import make_model
from torch import nn

import loadstone
from loadstone.loading.few_rows import MOST_ROWS, FewRowsLinear, pack_nibbles, speed_up_decoding
from loadstone.quantization import parse_recipe, to_torchao

RECIPES = {
    "int8-weight-only": torch.bfloat16,
    "float8-weight-only": torch.bfloat16,
    "int4-weight-only": torch.bfloat16,
    "int4-weight-only:group_size=32": torch.bfloat16,
    "intx4-weight-only": torch.bfloat16,
    "intx4-weight-only:mapping=asymmetric,group_size=64": torch.float32,
    "int8-weight-only:granularity=tensor": torch.float32,
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


@pytest.mark.parametrize("group", [16, 32, 128])
def test_nibbles_lie_where_the_kernel_reads_them(group: int) -> None:
    values = torch.randint(-8, 8, (5, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    words = pack_nibbles(values, group).view(5, -1, group // 8)
    # The kernel's way from four bits to a number: the mantissa of 1 + q / 16.
    shifts = [(words << (19 - 4 * i)) if 4 * i < 19 else (words >> (4 * i - 19)) for i in range(8)]
    floats = torch.stack([((bits & 0x780000) | 0x3F800000).view(torch.float32) for bits in shifts], 2)
    assert torch.equal(((floats - 1.5) * 16).flatten(1), values.float())


def test_a_plain_model_stays_as_it_is() -> None:
    assert speed_up_decoding(make_model()) == 0


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("shape", [(64, 256), (513, 256), (1024, 4096), (9000, 512)])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_products(recipe: str, shape: tuple[int, int]) -> None:
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    outputs, inputs = shape
    model = nn.Sequential(nn.Linear(inputs, outputs)).to("cuda", RECIPES[recipe])
    quantize_(model, to_torchao(parse_recipe(recipe).scheme))
    plain = model[0]
    assert speed_up_decoding(model) == 1
    for rows in (1, 2, MOST_ROWS, MOST_ROWS + 1, 40):
        x = torch.randn(rows, inputs, device="cuda", dtype=plain.weight.dtype)
        with torch.no_grad():
            expected, found = plain(x), model(x)
            exact = expected.double()
            if not recipe.startswith("int4"):
                exact = x.double() @ plain.weight.dequantize().double().t() + plain.bias.double()
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if rows > MOST_ROWS:
            assert torch.equal(found, expected)
        # Within a rounding of the output. tinygemm's tensors cannot be dequantized: its product rounds weights too.
        limit = 2**-6 if plain.weight.dtype == torch.bfloat16 else 1e-5
        assert (found - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("recipe", ["int8-weight-only", "int4-weight-only", "intx4-weight-only"])
def test_a_model_writes_the_same(recipe: str, tmp_path: Path) -> None:
    loadstone.finalize("builtin:tiny-llama", tmp_path / "q", recipe=recipe, dtype="bfloat16", device="cuda")
    plain = loadstone.load(tmp_path / "q", device="cuda")
    fast = loadstone.load(tmp_path / "q", device="cuda", fast=True)
    assert any(isinstance(m, FewRowsLinear) for m in fast.modules())
    ids = torch.arange(5, 25, device="cuda").view(1, -1)
    with torch.no_grad():
        a, b = plain(ids[:, :1]).logits.float(), fast(ids[:, :1]).logits.float()
        assert (a.log_softmax(-1) - b.log_softmax(-1)).abs().max() < 0.25
        # More rows than the kernel takes: the same bits.
        assert torch.equal(plain(ids).logits, fast(ids).logits)
    written = fast.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert written.shape == (1, 28)

"""On a CPU a replaced layer gives torchao's products, and a model that is loaded with them writes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import loadstone
from loadstone.loading.few_rows import speed_up_decoding
from loadstone.loading.few_rows_cpu import DenseLinear, Int4Linear, IntegerLinear
from loadstone.loading.input_rounding import SharedRounding
from loadstone.quantization import parse_recipe, to_torchao

RECIPES: dict[str, type[nn.Module]] = {
    "int8-weight-only": IntegerLinear,
    "int8-weight-only:granularity=tensor": DenseLinear,
    "int8-dynamic-act-int8-weight": IntegerLinear,
    "intx4-weight-only": Int4Linear,
    "intx4-weight-only:mapping=asymmetric,group_size=64": Int4Linear,
    "intx4-weight-only:group_size=0": IntegerLinear,
    "intx2-weight-only": Int4Linear,
    "intx4-weight-only:bits=8": DenseLinear,
    "int8-dynamic-act-int4-weight": Int4Linear,
    "int8-dynamic-act-intx-weight": DenseLinear,
    "float8-weight-only": DenseLinear,
    "nvfp4-weight-only": DenseLinear,
    "mxfp8-dynamic-act-mxfp8-weight": DenseLinear,
}


def replaced(recipe: str, inputs: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A quantized Linear and what replaces it."""
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 48)).to(dtype)
    quantize_(model, to_torchao(parse_recipe(recipe).scheme))
    plain = model[0]
    assert speed_up_decoding(model) == 1
    return plain, model[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_products(recipe: str, dtype: torch.dtype) -> None:
    if recipe.startswith("mx") and dtype == torch.float32:
        pytest.skip("torchao makes MX weights out of bfloat16 only")
    plain, fast = replaced(recipe, 128, dtype)
    assert type(fast) is RECIPES[recipe]
    for rows in (1, 2, 32, 33, 100):
        # Not aligned, as a part of a tensor may be.
        x = torch.randn(rows * 128 + 1).to(dtype)[1:].view(rows, 128)
        with torch.no_grad():
            expected, found = plain(x), fast(x)
        assert found.dtype == dtype and found.shape == expected.shape
        if rows > 32 and isinstance(fast, IntegerLinear):
            assert torch.equal(found, expected)
        limit = 2**-6 if dtype == torch.bfloat16 else 1e-5
        assert (found - expected).abs().max() <= limit * expected.abs().max()


def test_rows_that_the_kernel_fails_on_are_dequantized() -> None:
    plain, fast = replaced("int8-weight-only", 72, torch.bfloat16)
    x = torch.randn(2, 72, dtype=torch.bfloat16)
    assert type(fast) is DenseLinear
    torch.testing.assert_close(fast(x), plain(x), rtol=2**-6, atol=2**-6)
    x.requires_grad_()
    fast(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_model_writes_the_same_and_rounds_an_input_once(tmp_path: Path) -> None:
    recipe = "int8-dynamic-act-int4-weight"
    loadstone.finalize("builtin:tiny-llama", tmp_path / "q", recipe=recipe, dtype="bfloat16", device="cpu")
    plain = loadstone.load(tmp_path / "q", device="cpu")
    fast = loadstone.load(tmp_path / "q", device="cpu", fast=True)
    attention = fast.model.layers[0].self_attn
    assert isinstance(attention.q_proj.rounding, SharedRounding)
    assert attention.q_proj.rounding is attention.k_proj.rounding is attention.v_proj.rounding
    ids = torch.arange(5, 45).view(1, -1)
    with torch.no_grad():
        a, b = plain(ids[:, :1]).logits.float(), fast(ids[:, :1]).logits.float()
        assert (a.log_softmax(-1) - b.log_softmax(-1)).abs().max() < 0.5
        # More rows than the kernel takes: the same bits.
        assert torch.equal(plain(ids).logits, fast(ids).logits)
    assert fast.generate(ids, max_new_tokens=8, do_sample=False).shape == (1, 48)

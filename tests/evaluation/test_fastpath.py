from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from loadstone.evaluation.fastpath import Kept, keep_dequantized


def configs() -> dict[str, Any]:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
    )
    from torchao.quantization.quant_primitives import MappingType

    return {
        "int8-dynamic-act-int4": Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)),
        "int4-asymmetric": IntxWeightOnlyConfig(torch.int4, PerGroup(32), MappingType.ASYMMETRIC),
        "int2": IntxWeightOnlyConfig(torch.int2, PerGroup(16)),
        "int8-per-axis": IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
        "int8": Int8WeightOnlyConfig(),
        "int8-grouped": Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "int8-dynamic-act-int8": Int8DynamicActivationInt8WeightConfig(),
        "float8": Float8WeightOnlyConfig(),
        "nvfp4": NVFP4WeightOnlyConfig(),
    }


NAMES = (
    "int8-dynamic-act-int4",
    "int4-asymmetric",
    "int2",
    "int8-per-axis",
    "int8",
    "int8-grouped",
    "int8-dynamic-act-int8",
    "float8",
    "nvfp4",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits(model_factory: Any, name: str, dtype: torch.dtype) -> None:
    from torchao.quantization import quantize_

    # Wide enough that int8 products need more than one exact part (1088 > 1024 terms).
    model = model_factory(hidden_size=64, intermediate_size=1088).to(dtype)
    quantize_(model.model, configs()[name])
    fast = copy.deepcopy(model)
    kept = keep_dequantized(fast)
    ids = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(fast(input_ids=ids).logits, model(input_ids=ids).logits)
    if name == "int8-dynamic-act-int8" and dtype == torch.bfloat16:
        assert kept == 0
    else:
        assert kept == 14
        assert not any("torchao" in type(p.data).__module__ for p in fast.parameters())


def test_bias_is_kept() -> None:
    from torchao.quantization import quantize_

    for name, config in configs().items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=True))
        model.get_input_embeddings = lambda m=model: m[0]  # type: ignore[method-assign]
        quantize_(model, config)
        expected = model(torch.ones(2, 64))
        assert keep_dequantized(model) == 1, name
        assert torch.equal(model(torch.ones(2, 64)), expected), name


def test_a_replacement_that_differs_is_not_used(model_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import quantize_

    model = model_factory(hidden_size=64)
    quantize_(model.model, configs()["int8"])
    monkeypatch.setattr(
        "loadstone.evaluation.fastpath._replacement",
        lambda m: Kept(m.weight.dequantize() * 1.0001, m.bias, None),
    )
    assert keep_dequantized(model) == 0


def test_memory_is_respected(model_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import quantize_

    model = model_factory(hidden_size=64)
    quantize_(model.model, configs()["int8"])
    monkeypatch.setattr("loadstone.evaluation.fastpath.free_bytes", lambda device: 2 * 4 * 64 * 64 * 2)
    assert 0 < keep_dequantized(model) < 14


def test_plain_models_are_left_alone(model: Any) -> None:
    assert keep_dequantized(model) == 0

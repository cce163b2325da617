from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loadstone
from loadstone.evaluation.fast.products import DequantizedLinear, Int8LinearVnni, PackedProductInOrder
from loadstone.evaluation.fast.replace import FastPath, _amd, speed_up
from loadstone.loading.input_rounding import SharedRounding, int8_round_trip, int8_rows


def configs() -> dict[str, Any]:
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
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
    from torchao.quantization.quantize_.common import KernelPreference

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
        **{
            name: MXDynamicActivationMXWeightConfig(
                activation_dtype=dtype, weight_dtype=dtype, kernel_preference=KernelPreference.EMULATED
            )
            for name, dtype in (("mxfp4", torch.float4_e2m1fn_x2), ("mxfp8", torch.float8_e4m3fn))
        },
    }


@pytest.fixture(autouse=True)
def no_int8_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without integer products, where ours take their place."""
    monkeypatch.setattr("loadstone.evaluation.fast.replace._has_int8_products", lambda: False)


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
    "mxfp4",
    "mxfp8",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits(
    model_factory: Any, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao.quantization import quantize_

    if name.startswith("mx") and dtype != torch.bfloat16:
        pytest.skip("torchao makes MX weights out of bfloat16 only")
    # Wide enough that int8 products need more than one exact part (1088 > 1024 terms).
    model = model_factory(hidden_size=64, intermediate_size=1088).to(dtype)
    quantize_(model.model, configs()[name])
    fast = copy.deepcopy(model)
    monkeypatch.setattr("loadstone.evaluation.fast.replace._amd", lambda: False)
    assert speed_up(fast) == FastPath(dequantized=14)
    ids = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(fast(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not any("torchao" in type(p.data).__module__ for p in fast.parameters())


def test_bias_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import quantize_

    monkeypatch.setattr("loadstone.evaluation.fast.replace._amd", lambda: False)
    for name, config in configs().items():
        torch.manual_seed(0)
        dtype = torch.bfloat16 if name.startswith("mx") else torch.float32
        model: Any = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=True)).to(dtype)
        model.get_input_embeddings = lambda: torch.nn.Embedding(2, 2)
        quantize_(model, config)
        expected = model(torch.ones(2, 64, dtype=dtype))
        assert speed_up(model).dequantized == 1, name
        assert torch.equal(model(torch.ones(2, 64, dtype=dtype)), expected), name


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no integer products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_products_of_the_cpu(
    model_factory: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao.quantization import quantize_

    monkeypatch.setattr("loadstone.evaluation.fast.replace._has_int8_products", lambda: True)
    monkeypatch.setattr("loadstone.evaluation.fast.replace._amd", lambda: False)
    model = model_factory(hidden_size=64, intermediate_size=1088).to(dtype)
    quantize_(model.model, configs()["int8-dynamic-act-int8"])
    fast = copy.deepcopy(model)
    assert speed_up(fast) == FastPath(dequantized=14)
    assert isinstance(fast.model.layers[0].mlp.down_proj, Int8LinearVnni)
    ids = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(fast(input_ids=ids).logits, model(input_ids=ids).logits)


def test_weight_only_becomes_plain_linears(model_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import quantize_

    monkeypatch.setattr("loadstone.evaluation.fast.replace._amd", lambda: False)
    model = model_factory(hidden_size=64)
    quantize_(model.model, configs()["int2"])
    ids = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids).logits
    modules = len(list(model_factory(hidden_size=64).modules()))
    assert speed_up(model).dequantized == 14 and len(list(model.modules())) == modules
    assert type(model.model.layers[0].mlp.down_proj.weight.data) is torch.Tensor
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_replacement_that_differs_is_not_used(model_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import quantize_

    model = model_factory(hidden_size=64)
    quantize_(model.model, configs()["int8"])
    monkeypatch.setattr(
        "loadstone.evaluation.fast.replace._replacement",
        lambda m: DequantizedLinear(m.weight.dequantize() * 1.0001, m.bias, None),
    )
    assert speed_up(model).dequantized == 0


def test_memory_is_respected(model_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import quantize_

    model = model_factory(hidden_size=64)
    quantize_(model.model, configs()["int8"])
    monkeypatch.setattr("loadstone.evaluation.fast.replace.free_bytes", lambda device: 2 * 4 * 64 * 64 * 2)
    assert 0 < speed_up(model).dequantized < 14


@pytest.mark.skipif(not _amd(), reason="weights are packed on AMD CPUs only")
@pytest.mark.parametrize("name", [None, "int4-asymmetric", "int8", "float8"])
def test_packed_to_float32_rounding(model_factory: Any, name: str | None) -> None:
    from torchao.quantization import quantize_

    model = model_factory(hidden_size=64)
    if name is not None:
        quantize_(model.model, configs()[name])
    fast = copy.deepcopy(model)
    assert speed_up(fast) == FastPath(dequantized=0 if name is None else 14, repacked=15)
    ids = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = model(input_ids=ids).logits, fast(input_ids=ids).logits
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    targets = torch.randint(0, 400, (150,), generator=torch.Generator().manual_seed(2))
    losses = [torch.nn.functional.cross_entropy(x.flatten(0, 1).double(), targets) for x in (expected, got)]
    assert abs(losses[0] - losses[1]) < 1e-6


def test_integer_products_stay_exact_when_packed() -> None:
    from torchao.quantization import quantize_

    model = torch.nn.Sequential(torch.nn.Linear(2100, 48, bias=True))
    with torch.no_grad():
        # Values near the largest, all of one sign: sums beyond what float32 holds exactly.
        model[0].weight.copy_(0.9 + 0.1 * torch.rand(48, 2100))
    quantize_(model, configs()["int8-dynamic-act-int8"])
    fast: Any = copy.deepcopy(model)
    fast.get_input_embeddings = lambda: torch.nn.Embedding(2, 2)
    fast.get_output_embeddings = lambda: None
    assert speed_up(fast).dequantized == 1
    x = 0.9 + 0.1 * torch.rand(17, 2100, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fast(x), model(x))


def test_narrow_models_are_not_packed(model_factory: Any) -> None:
    assert speed_up(model_factory().to(torch.bfloat16)) == FastPath()


@pytest.mark.skipif(not _amd(), reason="weights are packed on AMD CPUs only")
@pytest.mark.parametrize("name", ["int8-dynamic-act-int4", "int8-dynamic-act-int8"])
def test_layers_that_round_activations_stay_exact(model_factory: Any, name: str) -> None:
    from torchao.quantization import quantize_

    # Wider than one of MKL's sums (192 terms), and not a multiple of it.
    model = model_factory(hidden_size=256, intermediate_size=1088)
    quantize_(model.model, configs()[name])
    fast = copy.deepcopy(model)
    assert speed_up(fast) == FastPath(dequantized=14, repacked=15)
    ids = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(fast.model(input_ids=ids)[0], model.model(input_ids=ids)[0])
        assert torch.allclose(fast(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.skipif(not _amd(), reason="weights are packed on AMD CPUs only")
@pytest.mark.parametrize("shape", [(576, 192), (1536, 576), (200, 1000), (2048, 96), (960, 320)])
def test_packed_sums_are_added_in_mkls_order(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(shape[::-1], generator=generator), torch.randn(shape[1], generator=generator)
    packed = PackedProductInOrder(weight)
    for rows in (4, 33, 300, 700):
        x = torch.randn(1, rows, shape[0], generator=generator)
        assert torch.equal(packed(x), torch.nn.functional.linear(x, weight)), rows
        assert torch.equal(packed(x, bias), torch.nn.functional.linear(x, weight, bias)), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_torchaos(dtype: torch.dtype) -> None:
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

    generator = torch.Generator().manual_seed(4)
    x = (torch.randn(3, 70, 1536, generator=generator) * torch.rand(3, 70, 1, generator=generator) * 9).to(
        dtype
    )
    x[0, 0], x[0, 1], x[0, 2], x[0, 3] = 0.0, 5.0, -3.0, 1e-30
    assert torch.equal(int8_round_trip(x), intx._apply_int8_act_asym_per_token_quant_dequant(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_are_torchaos(dtype: torch.dtype) -> None:
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    generator = torch.Generator().manual_seed(4)
    x = (torch.randn(3, 70, 512, generator=generator) * torch.rand(3, 70, 1, generator=generator) * 9).to(
        dtype
    )
    x[0, 0], x[0, 1], x[0, 2], x[0, 3] = 0.0, 5.0, -3.0, 1e-30
    expected = Int8Tensor.from_hp(x, PerRow())
    values, scales = int8_rows(x)
    assert torch.equal(values, expected.qdata) and torch.equal(scales, expected.scale)


def test_siblings_round_their_input_once() -> None:
    calls: list[int] = []
    shared = SharedRounding(lambda x: (calls.append(1), x.round())[1])
    x = torch.randn(3)
    assert torch.equal(shared(x), x.round()) and shared(x) is shared(x)
    assert len(calls) == 1
    # Equal is not the same: another tensor is rounded anew, and nothing is held after its source is gone.
    shared(x.clone())
    assert len(calls) == 2 and shared._result is None
    assert shared(x) is not None and shared._result is not None
    del x
    assert shared._result is None


@pytest.mark.parametrize("recipe", ["", "int8-weight-only"])
def test_layers_whose_weight_the_model_reads_stay(tokenizer: Any, tmp_path: Path, recipe: str) -> None:
    """Mamba multiplies by its projection's weight itself."""
    import transformers
    from tests.small_models import make_model, save

    from loadstone.evaluation.options import Options
    from loadstone.evaluation.run import run
    from loadstone.quantization.weight_use import weights_used_otherwise

    assert not weights_used_otherwise(make_model())
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 400,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "time_step_rank": 8,
    }
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, pad_token_id=0)).float().eval()
    read = {name.rpartition(".")[2] for name in weights_used_otherwise(model)}
    assert "dt_proj" in read and "in_proj" not in read
    path = save(model, tokenizer, tmp_path / "m")
    if recipe:
        loadstone.finalize(path, tmp_path / "q", recipe=recipe)
        path = tmp_path / "q"
    fast, plain = (
        run(Options((str(path),), limit=2, fast=on)).values[str(path)]["nll"] for on in (True, False)
    )
    assert np.abs(fast - plain).max() < 1e-4

"""Quantized tensors from metadata: complete, of a known class, of shapes that fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from builders import INTX, TORCHAO_BLOCK

from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.artifact.servers import NO_GRADIENT, torchao_runs
from loadstone.artifact.torchao.checks import FlatTensor, check_shapes
from loadstone.artifact.torchao.config import check_agreement, check_block
from loadstone.artifact.torchao.flatten import flatten
from loadstone.artifact.torchao.tensors import described_names, flat_tensors, looks_flattened, part_name
from loadstone.errors import ArtifactError
from loadstone.quantization import RECIPES, parse_recipe, to_torchao

NAME = "m.q.weight"


def info(name: str, dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, dtype, tuple(shape), "model.safetensors", 0, 0)


def parts(**given: tuple) -> dict[str, TensorInfo]:
    return {part_name(NAME, k): info(part_name(NAME, k), *v) for k, v in given.items()}


GOOD = parts(qdata=("I8", 64, 64), scale=("BF16", 64, 2), zero_point=("I8", 64, 2))


def metadata(description: dict[str, Any], name: str = NAME) -> dict[str, str]:
    return {"tensor_names": json.dumps([name]), name: json.dumps(description)}


def intx(**changes: Any) -> dict[str, Any]:
    description = copy.deepcopy(INTX)
    description["_data"] |= changes
    return description


def test_a_good_tensor() -> None:
    flat = flat_tensors(metadata(INTX), GOOD)[NAME]
    assert flat.type == "IntxUnpackedToInt8Tensor" and set(flat.parts) == {"qdata", "scale", "zero_point"}
    assert flat.shape == (64, 64) and flat.numel == 4096 and flat.nominal_bits == 4
    assert flat.dtype == "bfloat16" and flat.quantizes_activations


def stored_as(*names: str) -> dict[str, TensorInfo]:
    return {
        part_name(name, data): info(part_name(name, data), part.dtype, *part.shape)
        for name in names
        for data, part in zip(("qdata", "scale", "zero_point"), GOOD.values(), strict=True)
    }


def described_as(*names: str) -> dict[str, str]:
    return {"tensor_names": json.dumps(names)} | {name: json.dumps(INTX) for name in names}


def test_tensors_stored_under_older_names_than_the_model_has() -> None:
    """As transformers saves a quantized Gemma 3: one ending is part of another, which the longer one decides."""
    described = described_as("model.lm.layers.0.q.weight", "model.tower.enc.layers.0.q.weight", "head.weight")
    stored = stored_as("lm.model.layers.0.q.weight", "tower.enc.layers.0.q.weight", "head.weight")
    found = flat_tensors(described, stored)
    assert set(found) == {"lm.model.layers.0.q.weight", "tower.enc.layers.0.q.weight", "head.weight"}
    assert all(part.name in stored for flat in found.values() for part in flat.parts.values())
    assert {part.name for part in found["lm.model.layers.0.q.weight"].parts.values()} == {
        part_name("lm.model.layers.0.q.weight", data) for data in ("qdata", "scale", "zero_point")
    }


@pytest.mark.parametrize(
    ("described", "stored"),
    [
        (("a.layers.0.q.weight", "b.layers.0.q.weight"), ("c.layers.0.q.weight", "d.layers.0.q.weight")),
        (("a.layers.0.q.weight",), ("c.layers.0.q.weight", "d.layers.0.q.weight")),
        (("a.layers.0.q.weight",), ("a.layers.0.k.weight",)),
    ],
)
def test_names_that_two_tensors_could_have_are_refused(
    described: tuple[str, ...], stored: tuple[str, ...]
) -> None:
    with pytest.raises(ArtifactError, match=r"lacks its part '[ab]\.layers\.0\.q\._weight_qdata'"):
        flat_tensors(described_as(*described), stored_as(*stored))


def test_names() -> None:
    assert part_name("a.b.weight", "qdata") == "a.b._weight_qdata"
    assert part_name("weight", "scale") == "_weight_scale"
    assert looks_flattened("a._weight_qdata") and looks_flattened("_gate_up_proj_scale")
    assert not looks_flattened("a.weight_scale") and not looks_flattened("a.scale")
    assert described_names({"format": "pt"}) == []
    assert described_names({NAME: json.dumps(INTX), "format": "pt"}) == [NAME]


def without(tensors: dict[str, TensorInfo], data_name: str) -> dict[str, TensorInfo]:
    return {k: v for k, v in tensors.items() if k != part_name(NAME, data_name)}


DTYPE = {"_type": "torch.dtype", "_data": "bfloat16"}


@pytest.mark.parametrize(
    ("description", "tensors", "words"),
    [
        (INTX, without(GOOD, "scale"), "lacks its part 'm.q._weight_scale'"),
        (INTX, GOOD | {NAME: info(NAME, "BF16", 64, 64)}, "stored both plain and quantized"),
        (INTX | {"_type": "AffineQuantizedTensor"}, GOOD, "unknown quantized class 'AffineQuantizedTensor'"),
        (INTX | {"_type": "Float9Tensor"}, GOOD, "unknown quantized class"),
        (INTX | {"_type": 7}, GOOD, "is malformed"),
        (INTX | {"_data": []}, GOOD, "is malformed"),
        (INTX | {"_tensor_data_names": []}, GOOD, "is malformed"),
        (INTX | {"_tensor_data_names": ["qdata", 1]}, GOOD, "is malformed"),
        (
            INTX | {"_tensor_data_names": ["qdata", "scale"]},
            without(GOOD, "zero_point"),
            "lacks the part zero_point",
        ),
        (INTX | {"_tensor_data_names": ["qdata", "scale", "scale"]}, GOOD, "names a part twice"),
        (INTX | {"_type": "Int8Tensor"}, GOOD, "unknown to Int8Tensor"),
        (INTX | {"_type": "Float8Tensor"}, GOOD, "unknown to Float8Tensor"),
        (
            intx(block_size=[1, 64]),
            GOOD,
            "'m.q._weight_scale' has shape [64, 2], its description asks for [64, 1]",
        ),
        (intx(block_size=[1, 16]), GOOD, "its description asks for [64, 4]"),
        (intx(block_size=[1, 48]), GOOD, "not divisible into blocks"),
        (intx(block_size=[32]), GOOD, "has the block_size [32]"),
        (intx(block_size=[1, 0]), GOOD, "has the block_size"),
        (intx(block_size="all"), GOOD, "has the block_size"),
        (intx(target_dtype={"_type": "torch.dtype", "_data": "int9"}), GOOD, "target_dtype 'int9'"),
        (intx(target_dtype={"_type": "torch.dtype", "_data": "load"}), GOOD, "names 'torch.load'"),
        (intx(target_dtype={"_type": "torch.dtype", "_data": "hub.load"}), GOOD, "names 'torch.hub.load'"),
        (intx(dtype={"_type": "torch.dtype", "_data": "int8"}), GOOD, "dtype 'int8'"),
        (intx(dtype={"_type": "Popen", "_data": ["sh"]}), GOOD, "names 'Popen'"),
        (intx(activation_quantization="int9"), GOOD, "unknown activation_quantization"),
        (intx(extra=1), GOOD, "attribute 'extra', unknown"),
        (INTX, GOOD | parts(qdata=("BF16", 64, 64)), "has dtype BF16"),
        (INTX, GOOD | parts(scale=("I8", 64, 2)), "has dtype I8, which no scale has"),
        (INTX, GOOD | parts(zero_point=("I64", 64, 2)), "has dtype I64"),
        (INTX, GOOD | parts(qdata=("I8", 32, 64)), "its description asks for [32, 2]"),
        (INTX, GOOD | parts(qdata=("I8", 64, 0)), "no weight has"),
        (INTX, GOOD | parts(qdata=("I8", 64)), "no weight has"),
        (
            INTX,
            GOOD | {"m.k._weight_qdata": info("m.k._weight_qdata", "I8", 2, 2)},
            "'m.k._weight_qdata' is part of a",
        ),
    ],
)
def test_refusals(description: dict, tensors: dict, words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        flat_tensors(metadata(description), tensors)
    assert words in caught.value.message


def test_metadata_that_was_stripped_is_refused() -> None:
    with pytest.raises(ArtifactError, match="no metadata describes"):
        flat_tensors({"format": "pt"}, GOOD)
    with pytest.raises(ArtifactError, match="does not describe it"):
        flat_tensors({"tensor_names": json.dumps([NAME])}, GOOD)
    with pytest.raises(ArtifactError, match="not a JSON list"):
        flat_tensors({"tensor_names": "{}"}, GOOD)


def test_a_float8_class_of_old_gets_the_float8_hint() -> None:
    with pytest.raises(ArtifactError) as caught:
        flat_tensors(metadata(INTX | {"_type": "Float8AQTTensor"}), GOOD)
    assert "quantization_config" in caught.value.remedy and "float8-weight-only" in caught.value.remedy


def test_one_broken_tensor_is_one_problem() -> None:
    problems: list[ArtifactError] = []
    flat_tensors(metadata(INTX), without(GOOD, "scale"), problems.append)
    assert len(problems) == 1


def tensor(kind: str, attributes: dict[str, Any], **given: tuple) -> FlatTensor:
    named = {k: info(part_name(NAME, k), *v) for k, v in given.items()}
    return FlatTensor(NAME, kind, attributes, named)


SHAPES = [
    tensor("Int8Tensor", {"block_size": [1, 64], "dtype": DTYPE}, qdata=("I8", 32, 64), scale=("F32", 32, 1)),
    tensor("Int8Tensor", {"block_size": [32, 64], "dtype": DTYPE}, qdata=("I8", 32, 64), scale=("F32", 1, 1)),
    tensor("Float8Tensor", {"block_size": [1, 64]}, qdata=("F8_E4M3", 32, 64), scale=("F32", 32, 1)),
    tensor("Float8Tensor", {"block_size": []}, qdata=("F8_E4M3", 32, 64), scale=("F32",)),
    tensor("Float8Tensor", {"block_size": [16, 16]}, qdata=("F8_E5M2", 32, 64), scale=("F32", 2, 4)),
    tensor(
        "Int4Tensor",
        {"block_size": [1, 32], "shape": [48, 64]},
        qdata=("I8", 48, 32),
        scale=("BF16", 2, 48),
        zero_point=("BF16", 2, 48),
    ),
    tensor(
        "Int4TilePackedTo4dTensor",
        {"block_size": [1, 32], "shape": [30, 1000]},
        qdata=("I32", 4, 8, 32, 4),
        scale_and_zero=("BF16", 32, 32, 2),
    ),
    tensor(
        "Int4PlainInt32Tensor",
        {"block_size": [1, 32], "shape": [48, 64]},
        qdata=("I32", 48, 8),
        scale=("BF16", 2, 48),
        zero_point=("I8", 2, 48),
    ),
    tensor(
        "NVFP4Tensor", {"block_size": 16, "orig_dtype": DTYPE}, qdata=("U8", 32, 32), scale=("F8_E4M3", 32, 4)
    ),
    tensor(
        "NVFP4Tensor",
        {"block_size": 16, "orig_dtype": DTYPE, "is_swizzled_scales": True},
        qdata=("U8", 32, 32),
        scale=("F8_E4M3", 32, 16),
        per_tensor_scale=("F32",),
    ),
    tensor(
        "MXTensor",
        {
            "block_size": 32,
            "orig_dtype": DTYPE,
            "elem_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
        },
        qdata=("F8_E4M3", 32, 64),
        scale=("F8_E8M0", 32, 2),
    ),
    tensor(
        "MXTensor",
        {
            "block_size": 32,
            "orig_dtype": DTYPE,
            "elem_dtype": {"_type": "torch.dtype", "_data": "float4_e2m1fn_x2"},
        },
        qdata=("U8", 32, 32),
        scale=("F8_E8M0", 32, 2),
    ),
]
BITS = [8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 8, 4]


@pytest.mark.parametrize(
    ("good", "bits"), zip(SHAPES, BITS, strict=True), ids=lambda x: getattr(x, "type", "")
)
def test_shapes_of_every_class(good: FlatTensor, bits: int) -> None:
    check_shapes(good)
    assert good.nominal_bits == bits
    for part in good.parts:
        if part == "qdata" and good.attributes["block_size"] == []:
            continue  # one scale for the whole tensor fits any shape
        stored = good.parts[part]
        wrong = info(stored.name, stored.dtype, *stored.shape, 3)
        with pytest.raises(ArtifactError, match=part if part != "qdata" else "weight"):
            check_shapes(FlatTensor(NAME, good.type, good.attributes, good.parts | {part: wrong}))


def changed(index: int, attributes: dict[str, Any] | None = None, **given: tuple) -> FlatTensor:
    """One of `SHAPES` with other attributes or parts."""
    good = SHAPES[index]
    named = {k: info(part_name(NAME, k), *v) for k, v in given.items()}
    return FlatTensor(NAME, good.type, good.attributes | (attributes or {}), good.parts | named)


INT4, TILED, NVFP4, MX = 5, 6, 8, 10


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (changed(NVFP4, {"block_size": 0}), "has the block_size 0"),
        (changed(NVFP4, {"block_size": "16"}), "has the block_size '16'"),
        (changed(NVFP4, {"block_size": True}), "has the block_size True"),
        (changed(NVFP4, {"block_size": 24}), "has rows of 64, not divisible into blocks of 24"),
        (changed(NVFP4, {"orig_dtype": {"_type": "torch.dtype", "_data": "int8"}}), "the dtype 'int8'"),
        (changed(NVFP4, {"orig_dtype": None}), "the dtype None"),
        (changed(NVFP4, scale=("F8_E5M2", 32, 4)), "has dtype F8_E5M2, not F8_E4M3"),
        (changed(MX, scale=("F8_E4M3", 32, 2)), "has dtype F8_E4M3, not F8_E8M0"),
        (changed(MX, qdata=("I8", 32, 64)), "has dtype I8"),
        (changed(INT4, {"block_size": [1, 48]}), "stands for rows of 64, not divisible into groups of 48"),
        (changed(INT4, {"shape": [48, 63], "block_size": [1, 21]}), "stands for rows of 63, not divisible"),
        (changed(INT4, {"shape": [48]}), "no weight has"),
        (changed(INT4, {"block_size": 32}), "has the block_size 32"),
        (changed(TILED, {"shape": [31, 2000]}), "its description asks for [4, 16, 32, 4]"),
        (changed(0, {"dtype": None}), "the dtype None"),
    ],
)
def test_descriptions_that_fit_no_parts(bad: FlatTensor, words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        check_shapes(bad)
    assert words in caught.value.message


def test_shapes_and_bits_agree_with_torchao(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from safetensors.torch import save_file
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    from loadstone.artifact.formats.safetensors import read_header

    cases = [
        (Int8WeightOnlyConfig(set_inductor_config=False), 8, 8.625),
        (Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), 8, 8.625),
        (
            Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
            4,
            8.75,
        ),
        (IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerGroup(32)), 2, 8.75),
        (Float8WeightOnlyConfig(set_inductor_config=False), 8, 8.5),
        (NVFP4WeightOnlyConfig(), 4, 4.5 + 32 / 8192),
    ]
    for config, nominal, stored in cases:
        model = torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False)).to(torch.bfloat16)
        quantize_(model, config)
        state, written = flatten_tensor_state_dict(dict(model.state_dict()))
        save_file(state, tmp_path / "m.safetensors", metadata=written)
        header = read_header(tmp_path / "m.safetensors")
        flat = flat_tensors(header.metadata, header.tensors)["0.weight"]
        assert flat.shape == (128, 64) and flat.nominal_bits == nominal
        assert flat.nbytes * 8 / flat.numel == pytest.approx(stored), type(config).__name__


def block(config: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": config}}


def config(kind: str, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": 2, "_data": data}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_type": "int8_weight_only"}, "form of an old transformers"),
        ({}, "malformed"),
        ({"quant_type": {"default": {}, "other": {}}}, "malformed"),
        ({"quant_type": {"default": ["x"]}}, "malformed"),
        (block(config("Popen", args=["sh"])), "names 'Popen'"),
        (block(config("quantize_")), "names 'quantize_'"),
        (block(config("PerRow")), "names 'PerRow'"),
        (
            block(config("Int8WeightOnlyConfig", granularity={"_type": "import_module", "_data": "os"})),
            "import_module",
        ),
        (block(config("Int8WeightOnlyConfig", x=[{"y": {"_type": "system", "_data": 1}}])), "names 'system'"),
        (
            block(config("IntxWeightOnlyConfig", weight_dtype={"_type": "torch.dtype", "_data": "load"})),
            "torch.load",
        ),
        (block(config("IntxWeightOnlyConfig", weight_dtype={"_type": ["x"], "_data": 1})), "no torchao"),
    ],
)
def test_a_block_may_name_torchao_configs_only(given: dict, words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        check_block(given)
    assert words in caught.value.message and "config.json" in caught.value.message


def test_every_config_of_torchao_is_known() -> None:
    pytest.importorskip("torchao")
    from importlib import import_module

    from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig

    from loadstone.artifact.torchao.config import _CONFIGS

    for module_name in ALLOWED_AO_MODULES:
        try:
            module = import_module(module_name)
        except ImportError:
            continue
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, AOBaseConfig) and name.endswith("Config"):
                assert name in _CONFIGS or value is AOBaseConfig, name


def problems_of(given: dict[str, Any], flat: dict[str, FlatTensor]) -> list[str]:
    found: list[ArtifactError] = []
    check_agreement(check_block(given), flat, found.append)
    return [p.message for p in found]


def test_config_and_tensors_must_be_of_one_recipe() -> None:
    flat = flat_tensors(metadata(INTX), GOOD)
    assert problems_of(TORCHAO_BLOCK, flat) == []
    assert problems_of(block(config("AWQConfig", base_config=config("Int8WeightOnlyConfig"))), flat) == []
    int4 = {"_type": "torch.dtype", "_data": "int4"}
    assert problems_of(block(config("IntxWeightOnlyConfig", weight_dtype=int4)), flat)[0].startswith(
        f"model.safetensors: quantized tensor '{NAME}' quantizes activations"
    )
    (mixed,) = problems_of(block(config("Int8WeightOnlyConfig")), flat)
    assert "is a IntxUnpackedToInt8Tensor, against Int8WeightOnlyConfig" in mixed
    int2 = {"_type": "torch.dtype", "_data": "int2"}
    (bits,) = problems_of(block(config("Int8DynamicActivationIntxWeightConfig", weight_dtype=int2)), flat)
    assert "holds int4, not int2" in bits
    per_module = config(
        "FqnToConfig",
        fqn_to_config={
            "a": config("Int8WeightOnlyConfig"),
            "_default": TORCHAO_BLOCK["quant_type"]["default"],
        },
    )
    assert problems_of(block(per_module), flat) == []
    other = config("FqnToConfig", fqn_to_config={"a": config("Int8WeightOnlyConfig"), "b": None})
    assert len(problems_of(block(other), flat)) == 1


@pytest.mark.parametrize("recipe", [name for name, each in RECIPES.items() if "cpu" in each.devices])
def test_whether_a_product_has_a_gradient(recipe: str) -> None:
    """What `inspect` says of adapters is what torchao does."""
    import torch
    from torchao.quantization import quantize_

    model = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False)).bfloat16()
    quantize_(model, to_torchao(parse_recipe(recipe).scheme))
    flat, _ = flatten("m.weight", model[0].weight)
    found = model(torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True))
    (stock, *_) = torchao_runs([flat.type], flat.quantizes_activations, False, False, False)
    assert found.requires_grad == (NO_GRADIENT not in stock.how)

"""Inputs are rounded as servers round them: by their definition here, by compressed-tensors (`make test-serving`) and
by vLLM's own functions (`make test-vllm`)."""

from typing import Any

import pytest
import torch

from loadstone.artifact.compressed_tensors import LayerScheme, QuantArgs
from loadstone.artifact.compressed_tensors.scheme import FLOAT, INT, MXFP4, MXFP8, NVFP4
from loadstone.quantization.served_inputs import describe_inputs, round_inputs

INT8 = LayerScheme(INT, QuantArgs(8, "int", "channel"), QuantArgs(8, "int", "token", dynamic=True))
INT8_ASYMMETRIC = LayerScheme(
    INT, QuantArgs(8, "int", "channel"), QuantArgs(8, "int", "token", symmetric=False, dynamic=True)
)
FP8 = LayerScheme(FLOAT, QuantArgs(8, "float", "channel"), QuantArgs(8, "float", "token", dynamic=True))
FP8_GROUPS = LayerScheme(
    FLOAT, QuantArgs(8, "float", "block", block=(128, 128)), QuantArgs(8, "float", "group", 128, dynamic=True)
)
FP8_STATIC = LayerScheme(FLOAT, QuantArgs(8, "float", "tensor"), QuantArgs(8, "float", "tensor"))
INT8_STATIC = LayerScheme(INT, QuantArgs(8, "int", "channel"), QuantArgs(8, "int", "tensor"))
FP4 = QuantArgs(4, "float", "tensor_group", 16)
NVFP4_BOTH = LayerScheme(NVFP4, FP4, QuantArgs(4, "float", "tensor_group", 16, dynamic="local"))
MX8 = QuantArgs(8, "float", "group", 32, scale_dtype="uint8", dynamic=True)
MXFP8_BOTH = LayerScheme(MXFP8, QuantArgs(8, "float", "group", 32, scale_dtype="uint8"), MX8)
MXFP4_BOTH = LayerScheme(
    MXFP4, QuantArgs(4, "float", "group", 32), QuantArgs(4, "float", "group", 32, dynamic=True)
)
ALL = {
    "int8": INT8, "int8-asymmetric": INT8_ASYMMETRIC, "fp8": FP8, "fp8-groups": FP8_GROUPS, "fp8-static": FP8_STATIC,
    "int8-static": INT8_STATIC, "nvfp4": NVFP4_BOTH, "mxfp8": MXFP8_BOTH, "mxfp4": MXFP4_BOTH,
}  # fmt: skip
STORED = {
    "fp8-static": torch.tensor([0.01]),
    "int8-static": torch.tensor([0.03]),
    "nvfp4": torch.tensor([700.0]),
}


def inputs(rows: int = 40, width: int = 256) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, some with an outlier."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(3))
    x *= torch.logspace(-4, 2, rows)[:, None]
    x[::3, 5] *= 40
    x[7] = 0
    return x


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_changes_little_and_twice_the_same(name: str, dtype: torch.dtype) -> None:
    x = inputs(width=320 if name == "fp8-groups" else 256).to(dtype)
    found = round_inputs(x, ALL[name], STORED.get(name))
    assert found.dtype == dtype and found.shape == x.shape and found.isfinite().all()
    assert not found[7].any() and not torch.equal(found, x)
    if name not in STORED:
        # Within one step of the coarsest part of each format, of the row's (or group's) largest.
        bound = 0.34 if "4" in name else 0.07
        assert ((found - x).float().abs().amax(-1) <= bound * x.float().abs().amax(-1) + 1e-8).all()
    assert torch.equal(round_inputs(x[None], ALL[name], STORED.get(name))[0], found)
    assert describe_inputs(ALL[name])


def test_int8_by_its_definition() -> None:
    x = inputs()
    found = round_inputs(x, INT8)
    for row, rounded in zip(x, found, strict=True):
        step = row.abs().max() / 127
        steps = rounded / step if step else rounded
        assert torch.allclose(steps, steps.round(), atol=1e-4) and steps.abs().max() <= 127.001
        assert ((rounded - row).abs() <= step / 2 * 1.001).all()


def test_values_beyond_a_stored_range_are_cut_off() -> None:
    x = torch.tensor([[1000.0, -1000.0, 0.5]])
    assert round_inputs(x, FP8_STATIC, torch.tensor([0.01]))[0, 0] == pytest.approx(4.48)
    assert round_inputs(x, INT8_STATIC, torch.tensor([0.03]))[0].tolist() == pytest.approx(
        [3.81, -3.84, 0.51]
    )
    shifted = round_inputs(x, INT8_STATIC, torch.tensor([0.03]), torch.tensor([-100]))
    assert shifted[0].tolist() == pytest.approx([227 * 0.03, -28 * 0.03, 0.51])


def test_what_is_not_known_is_said() -> None:
    weights = QuantArgs(8, "int", "channel")
    for args in (
        QuantArgs(4, "int", "token", dynamic=True),
        QuantArgs(8, "int", "channel"),
        QuantArgs(8, "float", "attn_head"),
    ):
        assert describe_inputs(LayerScheme(INT, weights, args)) == ""
    assert describe_inputs(LayerScheme(INT, weights)) == ""
    assert describe_inputs(INT8) == "int8 per token, scale = largest / 127"


@pytest.mark.serving
@pytest.mark.parametrize("name", ["fp8", "fp8-groups", "nvfp4", "mxfp4", "int8", "int8-asymmetric"])
def test_compressed_tensors_rounds_alike(name: str) -> None:
    """All but int8 in nearly every value: it divides by the scale where vLLM multiplies. Its int8 scale is
    largest / 127.5, vLLM's largest / 127."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from loadstone.artifact.compressed_tensors import Group, write_block

    scheme = ALL[name]
    written = write_block([Group("g", ("Linear",), scheme)], [])["config_groups"]["g"]["input_activations"]
    if name == "mxfp4":
        written["scale_dtype"] = "torch.uint8"
    if name == "nvfp4":
        written["scale_dtype"] = "torch.float8_e4m3fn"
    args: Any = QuantizationArgs.model_validate(written)
    # The package takes the dimensions before the last as tokens of one batch.
    x = inputs()[None]
    x = torch.cat((x[:, :7], x[:, 8:]), 1)
    if name.startswith("fp8"):
        # vLLM's scales of float8 have a floor, which rows below 0.002 reach.
        x *= 1000
    stored = STORED.get(name)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1), global_scale=stored)
    theirs = fake_quantize(x=x, scale=scale, zero_point=zero, args=args, global_scale=stored)
    ours = round_inputs(x, scheme, stored)
    same = (ours == theirs).float().mean()
    close = (ours - theirs).abs() <= 1e-6 * theirs.abs()
    if name.startswith("int8"):
        # Never more than a step apart.
        assert ((ours - theirs).abs() <= 1.01 * x.abs().amax(-1, keepdim=True) * 2 / 255).all()
    else:
        assert close.float().mean() > 0.995, (name, float(same), float(close.float().mean()))


@pytest.mark.vllm
def test_vllm_rounds_alike() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.mxfp8_utils import _mxfp8_e4m3_quantize_torch
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    x = inputs()
    with set_current_vllm_config(VllmConfig()):
        tokens = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
        values, scale = tokens.forward_native(x)
        assert torch.equal(values.float() * scale, round_inputs(x, FP8))
        values, scale = QuantFP8(static=False, group_shape=GroupShape(1, 128)).forward_native(x)
        assert torch.equal(values.float() * scale.repeat_interleave(128, -1), round_inputs(x, FP8_GROUPS))
        static = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR)
        values, _ = static.forward_native(x, STORED["fp8-static"])
        assert torch.equal(values.float() * 0.01, round_inputs(x, FP8_STATIC, STORED["fp8-static"]))
    values, exponents = _mxfp8_e4m3_quantize_torch(x)
    scale = torch.exp2(exponents.float() - 127).repeat_interleave(32, -1)
    assert torch.equal(values.float() * scale, round_inputs(x, MXFP8_BOTH))
    found = ref_nvfp4_quant_dequant(x.clone(), STORED["nvfp4"], 16)
    assert torch.equal(found, round_inputs(x, NVFP4_BOTH, STORED["nvfp4"]))

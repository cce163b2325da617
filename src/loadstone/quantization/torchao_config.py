"""Schemes to torchao configs, and quantized tensors back to schemes.

Source: torchao 0.18 ``quantization/quant_api.py``, ``prototype/mx_formats/inference_workflow.py``. Options that set
process-wide inductor flags (``set_inductor_config``) are left off: with them compiling one layer takes minutes.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from loadstone.artifact.torchao.tensors import FlatTensor, unknown_class_hint
from loadstone.errors import ArtifactError
from loadstone.quantization.schemes import (
    Float8DynActFloat8Weight,
    Float8DynActInt4Weight,
    Float8WeightOnly,
    Int4WeightOnly,
    Int8DynActInt8Weight,
    Int8DynActIntxWeight,
    Int8WeightOnly,
    IntxWeightOnly,
    MxDynActMxWeight,
    Nvfp4DynActNvfp4Weight,
    Nvfp4WeightOnly,
    Scheme,
)


@singledispatch
def to_torchao(scheme: Any) -> Any:
    """The torchao config (`AOBaseConfig`) that quantizes by ``scheme``."""
    raise TypeError(f"no torchao config for {scheme!r}")


@to_torchao.register
def _(scheme: Int8DynActIntxWeight) -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig

    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=_intx(scheme.bits),
        weight_granularity=_group(scheme.group_size),
        weight_mapping_type=_mapping(scheme.mapping),
        intx_choose_qparams_algorithm=_intx_rounding(scheme.rounding),
    )


@to_torchao.register
def _(scheme: IntxWeightOnly) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig

    return IntxWeightOnlyConfig(
        weight_dtype=_intx(scheme.bits),
        granularity=_group(scheme.group_size),
        mapping_type=_mapping(scheme.mapping),
        intx_choose_qparams_algorithm=_intx_rounding(scheme.rounding),
    )


@to_torchao.register
def _(scheme: Int8DynActInt8Weight) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(
        act_mapping_type=_mapping(scheme.act_mapping),
        granularity=_granularity(scheme.granularity),
        set_inductor_config=False,
    )


@to_torchao.register
def _(scheme: Int8WeightOnly) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(granularity=_granularity(scheme.granularity), set_inductor_config=False)


@to_torchao.register
def _(scheme: Int4WeightOnly) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(
        group_size=scheme.group_size,
        int4_packing_format="tile_packed_to_4d",
        int4_choose_qparams_algorithm="hqq" if scheme.rounding == "hqq" else "tinygemm",
        set_inductor_config=False,
    )


@to_torchao.register
def _(scheme: Float8WeightOnly) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig(granularity=_granularity(scheme.granularity), set_inductor_config=False)


@to_torchao.register
def _(scheme: Float8DynActFloat8Weight) -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    return Float8DynamicActivationFloat8WeightConfig(
        granularity=_granularity(scheme.granularity), set_inductor_config=False
    )


@to_torchao.register
def _(scheme: Float8DynActInt4Weight) -> Any:
    from torchao.quantization import Float8DynamicActivationInt4WeightConfig

    return Float8DynamicActivationInt4WeightConfig()


@to_torchao.register
def _(scheme: Nvfp4WeightOnly) -> Any:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    return NVFP4WeightOnlyConfig()


@to_torchao.register
def _(scheme: Nvfp4DynActNvfp4Weight) -> Any:
    from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

    return NVFP4DynamicActivationNVFP4WeightConfig()


@to_torchao.register
def _(scheme: MxDynActMxWeight) -> Any:
    import torch
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.quantization.quantize_.common import KernelPreference

    dtype = torch.float4_e2m1fn_x2 if scheme.bits == 4 else torch.float8_e4m3fn
    # AUTO quantizes anywhere and then fails in the first forward off Blackwell; EMULATED runs everywhere.
    return MXDynamicActivationMXWeightConfig(
        activation_dtype=dtype, weight_dtype=dtype, kernel_preference=KernelPreference.EMULATED
    )


def scheme_of(tensor: FlatTensor, *, has_zero_points: bool | None = None) -> Scheme:
    """Infer the scheme of a stored tensor from its class and attributes.

    ``has_zero_points``: whether intx weights are asymmetric (both kinds store zero points; symmetric ones are all 0);
    None means unknown and counts as symmetric. The way of rounding cannot be inferred and is the default: loading does
    not depend on it. Raises `ArtifactError` for a class it cannot map.
    """
    a = tensor.attributes
    match tensor.type:
        case "IntxUnpackedToInt8Tensor":
            bits = int(_name(a["target_dtype"]).removeprefix("int"))
            group = _group_of(tensor)
            mapping = "asymmetric" if has_zero_points else "symmetric"
            if a.get("activation_quantization") == "int8_asym_per_token":
                return Int8DynActIntxWeight(bits, group, mapping)  # type: ignore[arg-type]
            return IntxWeightOnly(bits, group, mapping)  # type: ignore[arg-type]
        case "Int8Tensor":
            act = a.get("act_quant_kwargs")
            if act is None:
                return Int8WeightOnly(_row_or_tensor(tensor))  # type: ignore[arg-type]
            act_mapping = str(_name(act["_data"]["mapping_type"])).lower()
            return Int8DynActInt8Weight(_row_or_tensor(tensor), act_mapping)  # type: ignore[arg-type]
        case "Float8Tensor":
            if a.get("act_quant_kwargs") is None:
                return Float8WeightOnly(_row_or_tensor(tensor))  # type: ignore[arg-type]
            return Float8DynActFloat8Weight(_row_or_tensor(tensor))  # type: ignore[arg-type]
        case "Int4TilePackedTo4dTensor" | "Int4Tensor" | "Int4PlainInt32Tensor":
            return Int4WeightOnly(int(a["block_size"][-1]))  # type: ignore[arg-type]
        case "NVFP4Tensor":
            return Nvfp4WeightOnly() if a.get("act_quant_kwargs") is None else Nvfp4DynActNvfp4Weight()
        case "MXTensor":
            return MxDynActMxWeight(4 if "float4" in _name(a["elem_dtype"]) else 8)
    raise ArtifactError(
        f"tensor '{tensor.name}' has the unknown quantized class '{tensor.type}'",
        unknown_class_hint(tensor.type),
    )


def _name(encoded: Any) -> str:
    return encoded["_data"] if isinstance(encoded, dict) else str(encoded)


def _group_of(tensor: FlatTensor) -> int:
    """Group size of an intx tensor; 0 when one group spans the row."""
    group = int(tensor.attributes["block_size"][-1])
    return 0 if group == tensor.parts["qdata"].shape[-1] else group


def _row_or_tensor(tensor: FlatTensor) -> str:
    return "tensor" if tensor.parts["scale"].numel == 1 and tensor.parts["qdata"].shape[0] > 1 else "row"


def _intx(bits: int) -> Any:
    import torch

    return getattr(torch, f"int{bits}")


def _group(group_size: int) -> Any:
    from torchao.quantization import PerAxis, PerGroup

    return PerGroup(group_size) if group_size else PerAxis(0)


def _granularity(granularity: str) -> Any:
    from torchao.quantization import PerRow, PerTensor

    return PerRow() if granularity == "row" else PerTensor()


def _mapping(mapping: str) -> Any:
    from torchao.quantization import MappingType

    return MappingType.SYMMETRIC if mapping == "symmetric" else MappingType.ASYMMETRIC


def _intx_rounding(rounding: str) -> Any:
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    # torchao has no name for the others: the tensors are the same class, and a config is read for that alone.
    hqq = rounding == "hqq"
    return IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY if hqq else IntxChooseQParamsAlgorithm.AFFINE

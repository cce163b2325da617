"""What must hold of a torchao tensor before anything is built from it: its class, attributes, parts and
shapes.

torchao builds whatever class its metadata names and trusts every shape, so a damaged description gives wrong
numbers or a failure deep in a kernel. All of this follows from headers alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.errors import ArtifactError


def part_name(name: str, data_name: str) -> str:
    """``('m.weight', 'qdata') -> 'm._weight_qdata'``, torchao's flattened key."""
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}_{data_name}" if module else f"_{parameter}_{data_name}"


@dataclass(frozen=True)
class FlatTensor:
    """One quantized tensor: class name, attributes (torchao's JSON), and its parts by data name."""

    name: str
    type: str
    attributes: dict[str, Any] = field(repr=False)
    parts: dict[str, TensorInfo] = field(repr=False)
    metadata: str = field(repr=False, default="")

    def renamed(self, file: str) -> FlatTensor:
        """The same tensor with its parts in ``file``, under the names that they have in safetensors."""
        parts = {k: p._replace(name=part_name(self.name, k), file=file) for k, p in self.parts.items()}
        return replace(self, parts=parts)

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales and zero points included."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight this stands for."""
        stored = self.attributes.get("shape")
        if isinstance(stored, list) and stored and all(type(n) is int for n in stored):
            return tuple(stored)
        qdata = self.parts["qdata"].shape
        if qdata and self._two_to_a_byte():
            return (*qdata[:-1], qdata[-1] * 2)
        return qdata

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nominal_bits(self) -> int:
        """Bits of information per weight, whatever they are stored in: 4 for an int4 kept in int8."""
        if self.type == "IntxUnpackedToInt8Tensor":
            return int(re.sub(r"\D", "", dtype_name(self.attributes.get("target_dtype")) or "8"))
        if self.type == "MXTensor":
            return 4 if self._two_to_a_byte() else 8
        return 4 if self.type.startswith(("Int4", "NVFP4")) else 8

    @property
    def dtype(self) -> str | None:
        """torch's name of the dtype it dequantizes to, None where the class does not record it."""
        return dtype_name(self.attributes.get("dtype") or self.attributes.get("orig_dtype"))

    @property
    def quantizes_activations(self) -> bool:
        return rounds_inputs(self.attributes)

    def _two_to_a_byte(self) -> bool:
        fp4 = "float4" in (dtype_name(self.attributes.get("elem_dtype")) or "")
        return self.type == "NVFP4Tensor" or (self.type == "MXTensor" and fp4)


def rounds_inputs(attributes: Mapping[str, Any]) -> bool:
    """Whether a tensor with these attributes quantizes what it is multiplied by."""
    return any(attributes.get(key) is not None for key in ("act_quant_kwargs", "activation_quantization"))


def unknown_class_hint(kind: str) -> str:
    """What to do about a quantized tensor class that is not known: the cheap way out first."""
    hint = "Restore the quantization_config block of config.json, or finalize again with this version"
    if "float8" in kind.lower() or "affinequantized" in kind.lower():
        hint += " (float8 tensors of older torchao releases must be made again with float8-weight-only)"
    return hint


@dataclass(frozen=True)
class _Spec:
    parts: tuple[str, ...]
    attributes: tuple[str, ...]
    optional_parts: tuple[str, ...] = ()
    optional_attributes: tuple[str, ...] = ()
    qdata: tuple[str, ...] = ("I8",)


# The classes torchao 0.18 can write to safetensors, with the names their constructors take.
_SPECS = {
    "IntxUnpackedToInt8Tensor": _Spec(
        ("qdata", "scale", "zero_point"), ("target_dtype", "block_size", "dtype", "activation_quantization")
    ),
    "Int8Tensor": _Spec(
        ("qdata", "scale"),
        ("block_size", "dtype"),
        ("zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale"),
        ("act_quant_kwargs", "reduce_range"),
    ),
    "Float8Tensor": _Spec(
        ("qdata", "scale"),
        (),
        (),
        ("block_size", "mm_config", "act_quant_kwargs", "kernel_preference", "dtype"),
        ("F8_E4M3", "F8_E5M2"),
    ),
    "Int4Tensor": _Spec(
        ("qdata", "scale", "zero_point"),
        ("block_size", "shape"),
        ("act_pre_scale",),
        ("activation_dtype",),
        ("I8", "U8"),
    ),
    "Int4TilePackedTo4dTensor": _Spec(
        ("qdata", "scale_and_zero"), ("block_size", "shape"), ("act_pre_scale",), (), ("I32",)
    ),
    "Int4PlainInt32Tensor": _Spec(
        ("qdata", "scale", "zero_point"), ("block_size", "shape"), ("act_pre_scale",), (), ("I32",)
    ),
    "MXTensor": _Spec(
        ("qdata", "scale"),
        (
            "elem_dtype",
            "block_size",
            "orig_dtype",
            "kernel_preference",
            "act_quant_kwargs",
            "is_swizzled_scales",
        ),
        (),
        (),
        ("F8_E4M3", "F8_E5M2", "U8", "F4"),
    ),
    "NVFP4Tensor": _Spec(
        ("qdata", "scale"),
        ("block_size", "orig_dtype"),
        ("per_tensor_scale", "act_per_tensor_scale"),
        ("is_swizzled_scales", "use_triton_kernel", "act_quant_kwargs"),
        ("U8", "F4"),
    ),
}
SUBCLASSES = tuple(_SPECS)

# Classes that attributes may name (torchao/prototype/safetensors/safetensors_utils.py).
_ATTRIBUTE_CLASSES = frozenset(
    [
        "Float8MMConfig",
        "QuantizeTensorToFloat8Kwargs",
        "QuantizeTensorToInt8Kwargs",
        "QuantizeTensorToMXKwargs",
        "QuantizeTensorToNVFP4Kwargs",
        "PerRow",
        "PerTensor",
        "KernelPreference",
        "MappingType",
        "ScaleCalculationMode",
    ]
)
_COMPUTE = ("float16", "bfloat16", "float32", "float64")
_TORCH_DTYPE = re.compile(r"u?int\d{1,2}|bfloat16|float\d{1,2}(_e\dm\d\w{0,10})?|bool|complex\d{2,3}")


def dtype_name(value: Any) -> str | None:
    """``"bfloat16"`` out of ``{"_type": "torch.dtype", "_data": "bfloat16"}``."""
    name = value.get("_data") if isinstance(value, dict) and value.get("_type") == "torch.dtype" else None
    return name if isinstance(name, str) else None


def foreign_class(tree: Any, allowed: frozenset[str]) -> str | None:
    """The first class named in a tree of torchao JSON that is not ``allowed``, or dtype that is none."""
    # torchao resolves these names with getattr on its modules and on torch: nothing else may get that far.
    for node in _dicts(tree):
        kind = node.get("_type")
        if kind is None:
            continue
        if kind == "torch.dtype":
            data = node.get("_data")
            if not isinstance(data, str) or not _TORCH_DTYPE.fullmatch(data):
                return f"torch.{data}"
        elif not isinstance(kind, str) or kind not in allowed:
            return str(kind)
    return None


def _dicts(tree: Any) -> Iterator[dict[str, Any]]:
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def looks_flattened(key: str) -> bool:
    """Whether a key has the form torchao gives to parts: ``…._weight_qdata`` and the like."""
    last = key.rpartition(".")[2]
    return last.startswith("_") and last.endswith(_PART_SUFFIXES)


def check_description(tensor: FlatTensor) -> None:
    """Raises `ArtifactError` when a description names foreign classes or does not fit its own class."""
    foreign = foreign_class(tensor.attributes, _ATTRIBUTE_CLASSES)
    if foreign is not None:
        what = f"the metadata of '{tensor.name}' names {ascii(foreign)[:80]}, no part of a tensor"
        raise ArtifactError(what, _DISTRUST)
    check_complete(tensor)
    spec, kind = _SPECS[tensor.type], tensor.type
    for what, given, known in (
        ("attribute", tensor.attributes, spec.attributes + spec.optional_attributes),
        ("part", tensor.parts, spec.parts + spec.optional_parts),
    ):
        for extra in sorted(given.keys() - set(known)):
            raise ArtifactError(
                f"the metadata of '{tensor.name}' has the {what} {ascii(extra)[:80]}, unknown to {kind}",
                _AGAIN,
            )


def check_complete(tensor: FlatTensor) -> None:
    """Raises `ArtifactError` when a tensor lacks a part or an attribute of its class."""
    spec = _SPECS[tensor.type]
    for what, given, required in (
        ("attribute", tensor.attributes, spec.attributes),
        ("part", tensor.parts, spec.parts),
    ):
        for missing in sorted(set(required) - given.keys()):
            raise ArtifactError(
                f"the metadata of '{tensor.name}' lacks the {what} {missing} of {tensor.type}", _AGAIN
            )


def check_shapes(tensor: FlatTensor) -> None:
    """Raises `ArtifactError` when the parts do not fit each other and the attributes in dtype and shape."""
    qdata = tensor.parts["qdata"]
    spec = _SPECS[tensor.type]
    if qdata.dtype not in spec.qdata:
        raise _misfit(
            tensor, qdata, f"has dtype {qdata.dtype}, {tensor.type} takes {' or '.join(spec.qdata)}"
        )
    if len(tensor.shape) < 2 or 0 in tensor.shape:
        raise _misfit(tensor, qdata, f"has shape {list(qdata.shape)}, which no weight has")
    # The int4 classes compute in the dtype of their scales; Float8Tensor may leave its own unsaid.
    says = any(k in tensor.attributes for k in ("dtype", "orig_dtype")) and not tensor.type.startswith("Int4")
    if says and tensor.dtype not in _COMPUTE:
        raise ArtifactError(f"the metadata of '{tensor.name}' has the dtype {tensor.dtype!r}", _AGAIN)
    if tensor.type in ("IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor"):
        _check_blocks(tensor)
    elif tensor.type in ("MXTensor", "NVFP4Tensor"):
        _check_micro_scales(tensor)
    else:
        _check_int4(tensor)


def _check_blocks(tensor: FlatTensor) -> None:
    """One scale for each block: scale.shape * block_size == qdata.shape, dimension by dimension."""
    qdata, scale = tensor.parts["qdata"], tensor.parts["scale"]
    blocks: Any = tensor.attributes.get("block_size")
    if tensor.type == "Float8Tensor" and not blocks:
        blocks = list(qdata.shape)
    _check_block_size(tensor, blocks, len(qdata.shape))
    if any(n % b for n, b in zip(qdata.shape, blocks, strict=True)):
        raise _misfit(tensor, qdata, f"has shape {list(qdata.shape)}, not divisible into blocks of {blocks}")
    grid = tuple(n // b for n, b in zip(qdata.shape, blocks, strict=True))
    _expect_shape(tensor, scale, grid, scalar=tensor.type == "Float8Tensor")
    if "zero_point" in tensor.parts:
        _expect_shape(tensor, tensor.parts["zero_point"], grid)
    _expect_float(tensor, scale)
    if tensor.type == "IntxUnpackedToInt8Tensor":
        target = dtype_name(tensor.attributes["target_dtype"]) or ""
        if not re.fullmatch(r"int[1-8]", target):
            raise ArtifactError(f"the metadata of '{tensor.name}' has the target_dtype {target!r}", _AGAIN)
        zero = tensor.parts["zero_point"]
        if zero.dtype != "I8" and zero.dtype not in FLOAT_DTYPES:
            raise _misfit(tensor, zero, f"has dtype {zero.dtype}")
        if tensor.attributes["activation_quantization"] not in (None, "int8_asym_per_token"):
            raise ArtifactError(
                f"the metadata of '{tensor.name}' has an unknown activation_quantization", _AGAIN
            )


def _check_micro_scales(tensor: FlatTensor) -> None:
    """MX and NVFP4: a scale per block along a row, plain or in the 32x16 tiles of ``to_blocked``."""
    block = tensor.attributes["block_size"]
    if type(block) is not int or block < 1:
        raise ArtifactError(f"the metadata of '{tensor.name}' has the block_size {ascii(block)[:80]}", _AGAIN)
    *leading, rows, columns = tensor.shape
    if columns % block:
        raise _misfit(
            tensor, tensor.parts["qdata"], f"has rows of {columns}, not divisible into blocks of {block}"
        )
    grid = (rows, columns // block)
    if tensor.attributes.get("is_swizzled_scales"):
        # Tiles of 128 rows by 4 scales, each stored as 32 x 16 (torchao/prototype/mx_formats/utils.py).
        grid = (-(-rows // 128) * 32, -(-columns // (4 * block)) * 16)
    _expect_shape(tensor, tensor.parts["scale"], (*leading, *grid))
    wanted = "F8_E8M0" if tensor.type == "MXTensor" else "F8_E4M3"
    if tensor.parts["scale"].dtype != wanted:
        raise _misfit(tensor, tensor.parts["scale"], f"has dtype {tensor.parts['scale'].dtype}, not {wanted}")
    if "per_tensor_scale" in tensor.parts:
        part = tensor.parts["per_tensor_scale"]
        if part.shape != () and part.shape != (*leading, 1, 1):
            raise _misfit(tensor, part, f"has shape {list(part.shape)}")


def _check_int4(tensor: FlatTensor) -> None:
    """Packed int4: the logical shape is an attribute, and two or eight values share a stored element."""
    *leading, rows, columns = tensor.shape
    blocks = tensor.attributes["block_size"]
    _check_block_size(tensor, blocks, len(tensor.shape))
    group, qdata = blocks[-1], tensor.parts["qdata"]
    if tensor.type == "Int4TilePackedTo4dTensor":
        rows, columns = -(-rows // 8) * 8, -(-columns // 1024) * 1024
        _expect_shape(tensor, qdata, (*leading, rows // 8, columns // 128, 32, 4))
        _expect_shape(tensor, tensor.parts["scale_and_zero"], (*leading, columns // group, rows, 2))
        return
    packed = 2 if tensor.type == "Int4Tensor" else 8
    if columns % packed or columns % group:
        raise _misfit(tensor, qdata, f"stands for rows of {columns}, not divisible into groups of {group}")
    _expect_shape(tensor, qdata, (*leading, rows, columns // packed))
    for part in ("scale", "zero_point"):
        _expect_shape(tensor, tensor.parts[part], (*leading, columns // group, rows))


def _check_block_size(tensor: FlatTensor, blocks: Any, dimensions: int) -> None:
    if (
        not isinstance(blocks, list)
        or len(blocks) != dimensions
        or not all(type(b) is int and b > 0 for b in blocks)
    ):
        raise ArtifactError(
            f"the metadata of '{tensor.name}' has the block_size {ascii(blocks)[:80]}", _AGAIN
        )


def _expect_shape(tensor: FlatTensor, part: TensorInfo, shape: tuple[int, ...], scalar: bool = False) -> None:
    if part.shape != shape and not (scalar and prod(shape) == 1 and part.numel == 1):
        raise _misfit(tensor, part, f"has shape {list(part.shape)}, its description asks for {list(shape)}")


def _expect_float(tensor: FlatTensor, part: TensorInfo) -> None:
    if part.dtype not in FLOAT_DTYPES:
        raise _misfit(tensor, part, f"has dtype {part.dtype}, which no scale has")


def _misfit(tensor: FlatTensor, part: TensorInfo, what: str) -> ArtifactError:
    return ArtifactError(f"{part.file}: '{part.name}' {what} (part of quantized '{tensor.name}')", _AGAIN)


_PART_SUFFIXES = ("_qdata", "_scale", "_zero_point", "_scale_and_zero", "_per_tensor_scale", "_act_pre_scale")
_AGAIN = "Finalize again from the source"
_DISTRUST = "Do not trust this artifact"

"""float8 weights with their scales: transformers' ``fp8``, ``mxfp8`` and ``fbgemm_fp8``, and ModelOpt's FP8 and NVFP4.

DeepSeek-V3, Qwen3 and others store ``P.weight`` (float8) and ``P.weight_scale_inv`` (a factor for each block); the
names of scales differ between writers, their meaning does not: weight = value x scale.
"""

from __future__ import annotations

from typing import Any

from loadstone.artifact.compressed_tensors.scheme import FP8, MXFP4, NVFP4, LayerScheme, QuantArgs
from loadstone.artifact.files import Sink
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.artifact.packed.weight import StoredWeight, misfit
from loadstone.errors import ArtifactError

_VALUES = ("F8_E4M3", "F8_E5M2")
# What follows the module's name, for a parameter `weight`; and the parameter's own name, for others (experts).
_MODULE_SCALES = (".weight_scale_inv", ".weight_scale", ".qscale_weight", ".scale")
_PARAMETER_SCALES = ("_scale_inv", "_scale")
_DEFAULT_BLOCK = (128, 128)
# Values that share a scale in MXFP4 and MXFP8, and in NVFP4.
_MX_GROUP, _NVFP4_GROUP = 32, 16


def fp8_weights(block: dict[str, Any], tensors: dict[str, TensorInfo], sink: Sink) -> dict[str, StoredWeight]:
    """Every float8 or float4 weight by its parameter's name. Problems go to ``sink``, naming the tensor."""
    size = _block_size(block)
    found: dict[str, StoredWeight] = {}
    for name, info in tensors.items():
        if name.endswith((*_MODULE_SCALES, *_PARAMETER_SCALES)):
            continue
        try:
            if info.dtype in _VALUES and len(info.shape) > 1:
                scale, given = find_scale(info, tensors), "weight_block_size" in block
                # Llama 4's experts are stored (in, out), with a scale for each output.
                turned = len(info.shape) > 2 and block.get("quant_method") == "fbgemm_fp8"
                found[name] = _fp8_weight(info, scale, size, given, turned)
            elif info.dtype in ("I8", "U8") and name.endswith(".weight") and len(info.shape) == 2:
                found[name] = _fp4_weight(info, tensors)
        except ArtifactError as error:
            sink(error)
    return found


def _block_size(block: dict[str, Any]) -> tuple[int, int] | None:
    """``weight_block_size`` of a config block: None where a scale belongs to rows or a whole tensor."""
    value = block.get("weight_block_size", _DEFAULT_BLOCK)
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= 1 << 20 for side in sides):
        raise ArtifactError(
            f"config.json: weight_block_size {ascii(value)[:40]} is not two sizes above zero",
            "Restore config.json from the source",
        )
    return sides


def find_scale(info: TensorInfo, tensors: dict[str, TensorInfo]) -> TensorInfo:
    """The scales of a weight; raises `ArtifactError` naming the weight that has none."""
    module = info.name.removesuffix(".weight")
    plain = module != info.name
    names = [module + suffix for suffix in (_MODULE_SCALES if plain else _PARAMETER_SCALES)]
    scale = next((tensors[name] for name in names if name in tensors), None)
    if scale is None:
        raise misfit(info, f"is {info.dtype} and has no scale ({names[0]})")
    return scale


def _fp8_weight(
    info: TensorInfo, scale: TensorInfo, size: tuple[int, int] | None, size_given: bool, turned: bool
) -> StoredWeight:
    *experts, rows, columns = info.shape
    if scale.dtype not in {*FLOAT_DTYPES, "F8_E8M0", "U8"}:
        raise misfit(scale, f"has dtype {scale.dtype}: scales are floating numbers or exponents")
    if 0 in info.shape:
        raise misfit(info, f"has shape {list(info.shape)}")
    grids: dict[tuple[int, ...], QuantArgs] = {}
    if size is not None:
        square = QuantArgs(8, "float", "block", block=size)
        grids[(*experts, -(-rows // size[0]), -(-columns // size[1]))] = square
    if size is None or not size_given:
        row, whole = QuantArgs(8, "float", "channel"), QuantArgs(8, "float", "tensor")
        grids |= {(*experts, rows, 1): row, (*experts, 1, 1): whole}
        grids |= {} if experts else {(rows,): row, (1,): whole, (): whole}
    if turned:
        column = QuantArgs(8, "float", "block", block=(rows, 1))
        grids = {(*experts, 1, columns): column, (*experts, columns, 1): column}
    if scale.dtype in ("F8_E8M0", "U8") and columns % _MX_GROUP == 0:
        # MXFP8, alone or as experts beside layers in square blocks.
        mx = QuantArgs(8, "float", "block", block=(1, _MX_GROUP))
        grids.setdefault((*experts, rows, columns // _MX_GROUP), mx)
    args = grids.get(scale.shape)
    if args is None:
        takes = " or ".join(str(list(grid)) for grid in grids)
        raise misfit(scale, f"has shape {list(scale.shape)}, the scales of {list(info.shape)} have {takes}")
    height = {"channel": 1, "tensor": 0}.get(args.strategy, args.block[0] if args.block else 0)
    heights = {"weight": 1, "weight_scale": height}
    if experts:
        heights = dict.fromkeys(heights, rows)
    parts = {"weight": info, "weight_scale": scale}
    return StoredWeight(info.name, LayerScheme(FP8, args), parts, info.shape, heights)


def _fp4_weight(info: TensorInfo, tensors: dict[str, TensorInfo]) -> StoredWeight:
    """Two e2m1 values a byte: with powers of two for each 32 (DeepSeek-V4's experts), or NVFP4 of ModelOpt."""
    scale = find_scale(info, tensors)
    rows, columns = info.shape[0], info.shape[1] * 2
    whole = tensors.get(f"{info.name.removesuffix('.weight')}.weight_scale_2")
    parts = {"weight_packed": info, "weight_scale": scale}
    heights = {"weight_packed": 1, "weight_scale": 1}
    if whole is None:
        kinds: tuple[str, ...] = ("U8", "F8_E8M0")
        scheme = LayerScheme(MXFP4, QuantArgs(4, "float", "group", _MX_GROUP))
    else:
        kinds, scheme = ("F8_E4M3",), LayerScheme(NVFP4, QuantArgs(4, "float", "tensor_group", _NVFP4_GROUP))
        if whole.dtype != "F32" or whole.numel != 1:
            raise misfit(whole, f"is {whole.dtype} {list(whole.shape)}, NVFP4 has one F32 a weight")
        parts["weight_scale_2"], heights["weight_scale_2"] = whole, 0
    group = scheme.weights.group_size or 1
    if scale.dtype not in kinds or scale.shape != (rows, columns // group) or columns % group:
        raise misfit(
            scale,
            f"is {scale.dtype} {list(scale.shape)}, {rows}x{columns} of {scheme} takes "
            f"{' or '.join(kinds)} {[rows, columns // group]}",
        )
    return StoredWeight(info.name, scheme, parts, (rows, columns), heights, "weight_packed")

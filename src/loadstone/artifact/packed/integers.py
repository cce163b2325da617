"""Integer weights in int32 words: GPTQ (AutoGPTQ, GPTQModel) and AWQ (AutoAWQ, version gemm).

Both store the transposed matrix, so that a word holds values of one column (GPTQ, along the inputs) or of one row
(AWQ, along the outputs). Scales are (groups, out), zero points (groups, out) in words along the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from loadstone.artifact.compressed_tensors.scheme import AWQ, GPTQ, LayerScheme, QuantArgs
from loadstone.artifact.files import Sink
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.artifact.packed.weight import StoredWeight, misfit
from loadstone.artifact.patterns import unsound
from loadstone.errors import ArtifactError

# Names of the stored tensors after the module's, and what they are called here.
_GPTQ_PARTS = {
    "qweight": "weight_packed",
    "scales": "weight_scale",
    "qzeros": "weight_zero_point",
    "g_idx": "weight_g_idx",
}
GPTQ_BITS, AWQ_BITS = (2, 3, 4, 8), (4,)
# Zero points of the first version are stored less one.
FIRST_VERSION = "gptq"


def unsupported_integers(block: dict[str, Any]) -> str:
    """What a GPTQ or AWQ block asks for that is not decoded here; empty where all is."""
    if block.get("quant_method") == "awq":
        version, bits = _named(block, "version", "gemm"), block.get("bits", block.get("w_bit", 4))
        if version != "gemm" or bits not in AWQ_BITS:
            return f"AWQ version {version[:20]} of {ascii(bits)[:20]} bits"
        return ""
    layout, bits = _version(block), block.get("bits")
    if layout not in (FIRST_VERSION, "gptq_v2") or block.get("is_marlin_format") is True:
        return f"the GPTQ checkpoint_format {layout[:20]}"
    return "" if bits in GPTQ_BITS else f"GPTQ of {ascii(bits)[:20]} bits"


def settings_of(block: dict[str, Any]) -> Callable[[str, int], dict[str, Any]]:
    """A function that gives a GPTQ or AWQ block's settings for a module.

    GPTQModel's ``dynamic`` changes them by pattern; the first that fits counts. Patterns that begin with ``-:`` name
    modules that are not quantized, as their tensors show. Raises `ArtifactError` for anything but patterns with
    settings.
    """
    given = block.get("dynamic") or {}
    if not isinstance(given, dict):
        raise ArtifactError(
            "config.json: quantization_config.dynamic is not an object", "Restore config.json from the source"
        )
    rules = {k.removeprefix("+:"): v for k, v in given.items() if not k.startswith("-:")}
    for pattern, changes in rules.items():
        why = unsound(pattern) if isinstance(changes, dict) else "has no settings"
        if why:
            raise ArtifactError(
                f"config.json: quantization_config.dynamic: {ascii(pattern)[:80]} {why}",
                "Restore config.json from the source",
            )

    def settings(module: str, bits: int) -> dict[str, Any]:
        found = (
            changes for pattern, changes in rules.items() if pattern == module or re.match(pattern, module)
        )
        return block | next(found, {})

    return settings


def integer_weights(
    settings: Callable[[str, int], dict[str, Any]], tensors: dict[str, TensorInfo], sink: Sink
) -> dict[str, StoredWeight]:
    """Every weight that is stored as integers. Problems go to ``sink``, naming the tensor.

    ``settings``: what a config block says of a module, given the bits that its tensors hold, and 0 where they do not
    tell.
    """
    found: dict[str, StoredWeight] = {}
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        try:
            parts = {
                known: tensors[f"{module}.{stored}"]
                for stored, known in _GPTQ_PARTS.items()
                if f"{module}.{stored}" in tensors
            }
            block = settings(module, _stored_bits(parts))
            make = _awq if block.get("quant_method") == "awq" else _gptq
            found[f"{module}.weight"] = make(f"{module}.weight", parts, block)
        except ArtifactError as error:
            sink(error)
    return found


def _stored_bits(parts: dict[str, TensorInfo]) -> int:
    """Bits of each value, by the zero points of a group, one for each output."""
    scale, zeros = parts.get("weight_scale"), parts.get("weight_zero_point")
    shapes = [each.shape for each in (scale, zeros) if each is not None and len(each.shape) == 2]
    return shapes[1][1] * 32 // shapes[0][1] if len(shapes) == 2 and shapes[0][1] else 0


def _gptq(name: str, parts: dict[str, TensorInfo], block: dict[str, Any]) -> StoredWeight:
    values = _matrix(parts["weight_packed"])
    bits = _bits(block["bits"], GPTQ_BITS, values)
    columns, rows = values.shape[0] * 32 // bits, values.shape[1]
    symmetric, first = bool(block.get("sym", True)), _version(block) == FIRST_VERSION
    groups = _check_scales(parts, rows, columns, bits)
    order = parts.get("weight_g_idx")
    if order is not None and (order.dtype not in ("I32", "I64") or order.shape != (columns,)):
        raise misfit(
            order, f"is {order.dtype} {list(order.shape)}, a group number for each of {columns} inputs"
        )
    reordered = bool(block.get("desc_act")) and order is not None
    args = QuantArgs(
        bits, "int", "group" if groups > 1 else "channel", _group_size(block, columns, groups), symmetric=symmetric,
        actorder="group" if reordered else None,
    )  # fmt: skip
    if order is None and groups > 1 and -(-columns // (args.group_size or columns)) != groups:
        raise misfit(parts["weight_scale"], f"has {groups} groups, not those of {columns} inputs")
    return _weight(name, LayerScheme(GPTQ if first else f"{GPTQ}_v2", args), parts, rows, columns)


def _awq(name: str, parts: dict[str, TensorInfo], block: dict[str, Any]) -> StoredWeight:
    values = _matrix(parts["weight_packed"])
    bits = _bits(block.get("bits", AWQ_BITS[0]), AWQ_BITS, values)
    columns, rows = values.shape[0], values.shape[1] * 32 // bits
    groups = _check_scales(parts, rows, columns, bits)
    size = _group_size(block, columns, groups)
    if size * groups != columns:
        raise misfit(
            parts["weight_scale"], f"has {groups} groups, {columns} inputs in groups of {size} take others"
        )
    args = QuantArgs(bits, "int", "group", size, symmetric=False)
    return _weight(name, LayerScheme(AWQ, args), parts, rows, columns)


def _weight(
    name: str, scheme: LayerScheme, parts: dict[str, TensorInfo], rows: int, columns: int
) -> StoredWeight:
    # Rows of the weight are columns of what is stored: all of it is read at once.
    return StoredWeight(name, scheme, parts, (rows, columns), dict.fromkeys(parts, 0), "weight_packed")


def _bits(given: Any, known: tuple[int, ...], values: TensorInfo) -> int:
    """Bits of each value, as the config or the zero points say."""
    if given not in known:
        raise misfit(values, f"is of {ascii(given)[:20]} bits a value, not {' or '.join(map(str, known))}")
    return int(given)


def _version(block: dict[str, Any]) -> str:
    return _named(block, "checkpoint_format", FIRST_VERSION)


def _named(block: dict[str, Any], key: str, usual: str) -> str:
    """The layout that a block names by ``key``, or by gptqmodel's ``format``."""
    return str(block.get(key) or block.get("format") or usual).lower()


def _group_size(block: dict[str, Any], columns: int, groups: int) -> int:
    size = block.get("group_size", block.get("q_group_size"))
    return size if type(size) is int and size > 0 and groups > 1 else columns


def _matrix(values: TensorInfo) -> TensorInfo:
    if values.dtype != "I32" or len(values.shape) != 2 or 0 in values.shape:
        raise misfit(values, f"is {values.dtype} {list(values.shape)}, packed values are I32 in a matrix")
    return values


def _check_scales(parts: dict[str, TensorInfo], rows: int, columns: int, bits: int) -> int:
    """The number of groups; raises `ArtifactError` for scales or zero points that are missing or of another shape."""
    values = parts["weight_packed"]
    for known, stored in (("weight_scale", "scales"), ("weight_zero_point", "qzeros")):
        if known not in parts:
            raise misfit(values, f"has no {stored} beside it")
    scale, zeros = parts["weight_scale"], parts["weight_zero_point"]
    if (
        scale.dtype not in FLOAT_DTYPES
        or len(scale.shape) != 2
        or scale.shape[1] != rows
        or not scale.shape[0]
    ):
        raise misfit(
            scale, f"is {scale.dtype} {list(scale.shape)}, a weight of {rows} outputs takes (groups, {rows})"
        )
    groups = scale.shape[0]
    wanted = (groups, -(-rows * bits // 32))
    if zeros.dtype != "I32" or zeros.shape != wanted:
        raise misfit(zeros, f"is {zeros.dtype} {list(zeros.shape)}, not I32 {list(wanted)}")
    if groups > columns:
        raise misfit(scale, f"has {groups} groups, more than the {columns} inputs")
    return groups

"""A scan of tensors on disk for values that no sound artifact holds, in bounded memory, beside the load itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from loadstone.artifact.compressed_tensors.scheme import FP4, LLM_INT8, NF4
from loadstone.artifact.files import naming, open_regular
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy
    import torch

    from loadstone.artifact.formats.safetensors import TensorInfo
    from loadstone.artifact.packed import Packed
    from loadstone.artifact.torchao.checks import FlatTensor


class Limit(NamedTuple):
    """The smallest and the largest bit pattern of a tensor's elements, read as ``view``; ``either_sign``: without their
    sign."""

    view: str
    low: int
    high: int
    either_sign: bool = False


Limits = dict[str, Limit]

_CHUNK = 4 << 20

# (view dtype, mask, value): an element is NaN or infinite exactly when (element & mask) == value.
_PATTERNS = {
    "BF16": ("uint16", 0x7F80, 0x7F80),
    "F16": ("uint16", 0x7C00, 0x7C00),
    "F32": ("uint32", 0x7F800000, 0x7F800000),
    "F64": ("uint64", 0x7FF0000000000000, 0x7FF0000000000000),
    "F8_E4M3": ("uint8", 0x7F, 0x7F),
    "F8_E5M2": ("uint8", 0x7C, 0x7C),
    "F8_E8M0": ("uint8", 0xFF, 0xFF),
}


# The finite values above zero.
POSITIVE = {
    "BF16": Limit("uint16", 1, 0x7F7F),
    "F16": Limit("uint16", 1, 0x7BFF),
    "F32": Limit("uint32", 1, 0x7F7FFFFF),
}
_POSITIVE_SCALES = ("IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor")


def limits_of(quantized: Iterable[FlatTensor]) -> Limits:
    """What the parts of quantized tensors may hold: scales above zero, intx values within their bits."""
    limits: Limits = {}
    for tensor in quantized:
        scale = tensor.parts.get("scale")
        if tensor.type in _POSITIVE_SCALES and scale is not None and scale.dtype in POSITIVE:
            limits[scale.name] = POSITIVE[scale.dtype]
        if tensor.type == "IntxUnpackedToInt8Tensor":
            bits = int(tensor.attributes["target_dtype"]["_data"].removeprefix("int"))
            limits[tensor.parts["qdata"].name] = Limit("int8", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return limits


def packed_limits(packed: Iterable[Packed]) -> Limits:
    """What the scales of packed weights may hold: numbers above zero, and powers of two that are numbers.

    auto-round gives integers scales below zero where the largest value of a group is above it.
    """
    limits: Limits = {}
    for weight in packed:
        if weight.scheme.format in (NF4, FP4, LLM_INT8):
            # bitsandbytes' factor of a block or row of zeros is zero.
            if weight.values.dtype in _PATTERNS:
                # Bytes of 4-bit values that are stored under a float dtype's name: no bits of them are wrong.
                limits[weight.values.name] = Limit("uint8", 0, 255)
            for scale in (weight.parts["weight_scale"], weight.parts.get("nested_scale")):
                if scale is not None and scale.dtype in POSITIVE:
                    limits[scale.name] = POSITIVE[scale.dtype]._replace(low=0)
            continue
        for suffix in ("weight_scale", "weight_scale_2"):
            scale = weight.parts.get(suffix)
            if scale is not None and scale.dtype in POSITIVE:
                limits[scale.name] = POSITIVE[scale.dtype]._replace(
                    either_sign=weight.scheme.weights.type == "int"
                )
            elif scale is not None and scale.dtype == "U8":
                limits[scale.name] = Limit("uint8", 0, 254)
    return limits


def check_values(directory: Path, tensors: Iterable[TensorInfo], limits: Limits | None = None) -> None:
    """Raise `ArtifactError` naming the first stored tensor that holds NaN, infinity or a value outside its limits.

    Reads through a 4 MiB buffer: resident memory does not grow with the model, unlike a scan of mapped tensors.
    """
    import numpy

    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    raw = numpy.frombuffer(buffer, dtype=numpy.uint8)
    by_file: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        if tensor.dtype in _PATTERNS or tensor.name in (limits or {}):
            by_file.setdefault(tensor.file, []).append(tensor)
    for file, entries in by_file.items():
        with open_regular(directory / file, buffering=0) as opened, naming(directory / file):
            for tensor in sorted(entries, key=lambda t: t.begin):
                for position in range(tensor.begin, tensor.end, _CHUNK):
                    count = os.preadv(opened.fileno(), [view[: min(_CHUNK, tensor.end - position)]], position)
                    if count < min(_CHUNK, tensor.end - position):
                        raise ArtifactError(
                            f"{file}: truncated inside tensor '{tensor.name}'", "Copy the file again"
                        )
                    _check(raw[:count], tensor, (limits or {}).get(tensor.name))


def check_tensor(tensor: torch.Tensor, info: TensorInfo, limits: Limits | None = None) -> None:
    """`check_values` for a tensor in memory (on the CPU), described by ``info``."""
    import torch

    if info.dtype in _PATTERNS or info.name in (limits or {}):
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        for position in range(0, len(raw), _CHUNK):
            # A copy: the check writes over what it looks at.
            _check(raw[position : position + _CHUNK].copy(), info, (limits or {}).get(info.name))


def surely_finite(tensor: torch.Tensor, *, positive: bool = False) -> bool:
    """Whether a tensor on the CPU holds finite numbers only (``positive``: above zero); False where that takes a closer
    look.

    The largest bit patterns tell, in a fraction of the time of comparing values.
    """
    import torch

    name = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}.get(
        str(tensor.dtype)[6:]
    )
    if name is None or not tensor.is_cpu or not tensor.numel():
        return False
    unsigned, _, infinity = _PATTERNS[name]
    bits = tensor.detach().contiguous().reshape(-1).view(getattr(torch, unsigned[1:])).numpy()
    if positive and bits.min() <= 0:
        return False
    # Negative numbers have the largest patterns of all when these are read without sign.
    lowest = infinity + (1 << (8 * tensor.itemsize - 1))
    return bool(bits.max() < infinity and bits.view(unsigned).max() < lowest)


def _check(raw: numpy.ndarray, tensor: TensorInfo, limit: Limit | None) -> None:
    problem = _problem(raw, tensor, limit)
    if problem:
        raise ArtifactError(
            f"{tensor.file}: tensor '{tensor.name}' holds {problem}",
            "The file is damaged or the training diverged: copy it again or use another checkpoint",
        )


def _problem(raw: numpy.ndarray, tensor: TensorInfo, limit: Limit | None) -> str:
    # numpy and not torch: one thread beside the load, which keeps torch's threads for itself.
    if limit is not None:
        name, low, high, either_sign = limit
        values = raw.view(name)
        if either_sign:
            values = values & values.dtype.type((1 << (8 * values.itemsize - 1)) - 1)
        outside = values.min() < low or values.max() > high
        if outside and name in ("int8", "uint8"):
            return f"values outside {low} to {high}"
        if not outside or tensor.dtype not in _PATTERNS:
            return ""
    name, mask, value = _PATTERNS[tensor.dtype]
    bits = raw.view(name)
    bits &= bits.dtype.type(mask)
    return (
        "NaN or infinity"
        if bits.max() == value
        else "a scale that is " + ("zero" if limit.either_sign else "not above zero")
        if limit is not None
        else ""
    )

"""bitsandbytes' weights as ``save_pretrained`` stores them: NF4 and FP4 in blocks, and the int8 of LLM.int8().

4 bits: ``P.weight`` is the weight row after row, two values a byte, the first in the high bits. Beside it are
``P.weight.absmax``, a factor for each block of values (blocks go on from one row to the next), and
``P.weight.quant_state.bitsandbytes__nf4``, JSON that says the shape, the dtype and the size of blocks. With double
quantization factors are bytes that stand for floats in turn (``nested_quant_map`` x ``nested_absmax`` + an offset).
8 bits: ``P.weight`` is int8, ``P.SCB`` the largest magnitude of each row. Read in bitsandbytes 0.50.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from loadstone.artifact.compressed_tensors.scheme import FP4, LLM_INT8, NF4, LayerScheme, QuantArgs
from loadstone.artifact.files import Sink, open_regular
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.artifact.packed.weight import StoredWeight, misfit
from loadstone.errors import ArtifactError

_STATES = {f".quant_state.bitsandbytes__{kind}": kind for kind in (NF4, FP4)}
# Names of the stored tensors after the weight's, and what they are called here.
_PARTS = {
    "absmax": "weight_scale",
    "quant_map": "quant_map",
    "nested_absmax": "nested_scale",
    "nested_quant_map": "nested_map",
}
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# A state is some two hundred bytes of JSON.
_LARGEST_STATE = 1 << 14


@dataclass(frozen=True)
class BlockwiseWeight(StoredWeight):
    """NF4 or FP4. ``rounded``: the dtype, in safetensors' spelling, that bitsandbytes decodes it to.

    ``offset`` is added to factors that are stored as bytes, and ``nested_size`` of these share a float.
    """

    rounded: str = "BF16"
    offset: float = 0.0
    nested_size: int = 0

    @property
    def dtype(self) -> str:
        return self.rounded


def bitsandbytes_weights(
    read: Callable[[TensorInfo], bytes], tensors: dict[str, TensorInfo], sink: Sink
) -> dict[str, StoredWeight]:
    """Every quantized weight by its parameter's name. Problems go to ``sink``, naming the tensor.

    ``read``: the bytes of a stored tensor.
    """
    found: dict[str, StoredWeight] = {}
    for name, info in tensors.items():
        suffix = next((each for each in _STATES if name.endswith(each)), "")
        parameter = name.removesuffix(suffix)
        try:
            if suffix:
                found[parameter] = _blockwise(parameter, _STATES[suffix], info, read(info), tensors)
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                found[f"{module}.weight"] = _int8(module, info, tensors)
            elif name.endswith(".weight") and info.dtype in ("I8", "U8") and not _has_state(name, tensors):
                beside = f"{name.removesuffix('weight')}SCB" if info.dtype == "I8" else f"{name}.quant_state"
                raise misfit(info, f"is {info.dtype} and has no scales ({beside})")
        except ArtifactError as error:
            sink(error)
    return found


def read_bytes(directory: Path, info: TensorInfo) -> bytes:
    """The content of a small tensor."""
    if info.nbytes > _LARGEST_STATE:
        raise misfit(info, f"has {info.nbytes} bytes, which is no quantization state")
    with open_regular(directory / info.file) as file:
        file.seek(info.begin)
        return file.read(info.nbytes)


def _has_state(name: str, tensors: dict[str, TensorInfo]) -> bool:
    module = name.removesuffix(".weight")
    return f"{module}.SCB" in tensors or any(name + suffix in tensors for suffix in _STATES)


def _blockwise(
    parameter: str, kind: str, info: TensorInfo, raw: bytes, tensors: dict[str, TensorInfo]
) -> BlockwiseWeight:
    state = _state(info, raw)
    shape, size = tuple(state["shape"]), state["blocksize"]
    if parameter not in tensors:
        raise misfit(info, f"has no values beside it ({parameter})")
    names = {known: f"{parameter}.{stored}" for stored, known in _PARTS.items()}
    parts = {known: tensors[name] for known, name in names.items() if name in tensors}
    parts = {"weight_packed": tensors[parameter], "quant_state": info} | parts
    count, columns = prod(shape), shape[-1]
    blocks, nested = -(-count // size), state.get("nested_blocksize", 0) if "nested_scale" in parts else 0
    wanted = {"weight_scale": blocks, "quant_map": 16}
    if nested:
        wanted |= {"nested_scale": -(-blocks // nested), "nested_map": 256}
    for known, length in wanted.items():
        part = parts.get(known)
        kinds = ("U8",) if nested and known == "weight_scale" else FLOAT_DTYPES
        if part is None:
            raise misfit(parts["weight_packed"], f"has no {names[known].rpartition('.')[2]} beside it")
        if part.dtype not in kinds or part.shape != (length,):
            what = f"is {part.dtype} {list(part.shape)}, {list(shape)} in blocks of {size} takes {[length]}"
            raise misfit(part, what)
    values = parts["weight_packed"]
    if values.nbytes != -(-count // 2) or not values.numel or values.shape[0] != values.numel:
        what = f"is {values.dtype} {list(values.shape)}, not two values a byte of {list(shape)}"
        raise misfit(values, what)
    # Rows of the weight that belong to one element: a part of a row, mostly.
    heights = {
        "weight_packed": Fraction(2 * values.nbytes // values.numel, columns),
        "weight_scale": Fraction(size, columns),
        "nested_scale": Fraction(size * nested, columns),
    }
    scheme = LayerScheme(kind, QuantArgs(4, "float", "group", size))
    return BlockwiseWeight(
        parameter, scheme, parts, shape, {part: heights.get(part, 0) for part in parts}, "weight_packed",
        _DTYPES[state["dtype"]], state.get("nested_offset", 0.0), nested,
    )  # fmt: skip


def _state(info: TensorInfo, raw: bytes) -> dict[str, Any]:
    """The checked JSON of a quantization state."""
    try:
        state = json.loads(raw)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise misfit(info, "is not JSON")
    shape = state.get("shape")
    if not isinstance(shape, list) or not 1 < len(shape) < 9 or not all(map(_is_size, shape)):
        raise misfit(info, f"says shape {ascii(shape)[:60]}, which is none of a matrix")
    for key in ("blocksize", "nested_blocksize"):
        if key in state and not _is_size(state[key]):
            raise misfit(info, f"says {key} {ascii(state[key])[:40]}")
    offset = state.get("nested_offset", 0.0)
    if "blocksize" not in state or state.get("dtype") not in tuple(_DTYPES):
        raise misfit(info, f"names no blocksize, or no dtype of {', '.join(_DTYPES)}")
    if not isinstance(offset, int | float) or not abs(offset) < 1e38:
        raise misfit(info, f"says nested_offset {ascii(offset)[:40]}")
    return state


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 32


def _int8(module: str, scale: TensorInfo, tensors: dict[str, TensorInfo]) -> StoredWeight:
    values = tensors.get(f"{module}.weight")
    if values is None or values.dtype != "I8" or len(values.shape) != 2 or 0 in values.shape:
        raise misfit(scale, f"has no int8 matrix beside it ({module}.weight)")
    if scale.dtype not in FLOAT_DTYPES or scale.shape != values.shape[:1]:
        what = f"is {scale.dtype} {list(scale.shape)}, a weight of {values.shape[0]} rows takes one for each"
        raise misfit(scale, what)
    parts, heights = {"weight": values, "weight_scale": scale}, {"weight": 1, "weight_scale": 1}
    if (layout := tensors.get(f"{module}.weight_format")) is not None:
        parts["weight_format"], heights["weight_format"] = layout, 0
    scheme = LayerScheme(LLM_INT8, QuantArgs(8, "int", "channel"))
    return StoredWeight(f"{module}.weight", scheme, parts, values.shape, heights)

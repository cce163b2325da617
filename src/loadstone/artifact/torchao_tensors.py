"""torchao's flattened tensors, understood from safetensors metadata alone.

torchao writes a quantized tensor ``P.weight`` as ``P._weight_qdata``, ``P._weight_scale``, … and describes it in the
header metadata under ``P.weight`` as JSON: ``{"_type", "_data", "_tensor_data_names"}``
(torchao/prototype/safetensors/safetensors_support.py). ``tensor_names`` lists all described tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from loadstone.artifact.headers import TensorInfo
from loadstone.errors import ArtifactError

# The classes torchao 0.18 can write to safetensors.
SUBCLASSES = (
    "Float8Tensor",
    "Int4Tensor",
    "Int4TilePackedTo4dTensor",
    "IntxUnpackedToInt8Tensor",
    "Int8Tensor",
    "Int4PlainInt32Tensor",
    "MXTensor",
    "NVFP4Tensor",
)


@dataclass(frozen=True)
class FlatTensor:
    """One quantized tensor: class name, attributes (torchao's JSON), and its parts by data name."""

    name: str
    type: str
    attributes: dict[str, Any] = field(repr=False)
    parts: dict[str, TensorInfo] = field(repr=False)
    metadata: str = field(repr=False, default="")

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def part_name(name: str, data_name: str) -> str:
    """``('m.weight', 'qdata') -> 'm._weight_qdata'``, torchao's flattened key."""
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}_{data_name}" if module else f"_{parameter}_{data_name}"


def described_names(metadata: dict[str, str]) -> list[str]:
    """Names that the header metadata describes, empty when torchao wrote none."""
    if "tensor_names" not in metadata:
        return []
    try:
        names = json.loads(metadata["tensor_names"])
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ArtifactError("header metadata 'tensor_names' is no JSON list of strings", _AGAIN)
    return names


def flat_tensors(metadata: dict[str, str], tensors: dict[str, TensorInfo]) -> dict[str, FlatTensor]:
    """All quantized tensors of a directory; raises `ArtifactError` for one that is incomplete or of unknown class.

    Keys that look like parts of a quantized tensor but that no description claims are refused too: their
    description was lost, and the raw integers must never be taken for weights.
    """
    found: dict[str, FlatTensor] = {}
    claimed: set[str] = set()
    for name in described_names(metadata) or [k for k in metadata if k in _described(metadata)]:
        if name not in metadata:
            raise ArtifactError(f"header metadata lists '{name}' and does not describe it", _AGAIN)
        description = _parse(name, metadata[name])
        kind = description["_type"]
        if kind == "Tensor":
            if name not in tensors:
                raise ArtifactError(f"tensor '{name}' is described in the metadata and stored nowhere", _AGAIN)
            continue
        if kind not in SUBCLASSES:
            raise ArtifactError(f"tensor '{name}' has the unknown quantized class '{kind}'", unknown_class_hint(kind))
        parts = {}
        for data_name in description["_tensor_data_names"]:
            key = part_name(name, data_name)
            if key not in tensors:
                raise ArtifactError(f"quantized tensor '{name}' lacks its part '{key}'", _AGAIN)
            parts[data_name] = tensors[key]
            claimed.add(key)
        if name in tensors:
            raise ArtifactError(f"tensor '{name}' is stored both plain and quantized", _AGAIN)
        found[name] = FlatTensor(name, kind, description["_data"], parts, metadata[name])
    for key, tensor in tensors.items():
        if key not in claimed and looks_flattened(key):
            raise ArtifactError(
                f"{tensor.file}: '{key}' is part of a quantized tensor that no metadata describes",
                "The safetensors metadata was lost (rewritten by another tool?): finalize again from the source",
            )
    return found


def looks_flattened(key: str) -> bool:
    """Whether a key has the form torchao gives to parts: ``…._weight_qdata`` and the like."""
    last = key.rpartition(".")[2]
    return last.startswith("_") and last.endswith(_PART_SUFFIXES)


def unknown_class_hint(kind: str) -> str:
    """What to do about a quantized tensor class that is not known: the cheap way out first."""
    hint = "Restore the quantization_config block of config.json, or finalize again with a recipe of this version"
    if "float8" in kind.lower() or "affinequantized" in kind.lower():
        hint += " (float8 tensors of older torchao releases must be made again with float8-weight-only)"
    return hint


def _described(metadata: dict[str, str]) -> set[str]:
    return {k for k, v in metadata.items() if k != "format" and v.startswith('{"_type"')}


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        description = json.loads(text)
        valid = isinstance(description["_type"], str)
        if valid and description["_type"] != "Tensor":
            names = description["_tensor_data_names"]
            valid = isinstance(description["_data"], dict) and isinstance(names, list) and bool(names)
            valid = valid and all(isinstance(n, str) for n in names)
    except (ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise ArtifactError(f"the header metadata of tensor '{name}' is malformed", _AGAIN)
    return description


_PART_SUFFIXES = ("_qdata", "_scale", "_zero_point", "_scale_and_zero", "_per_tensor_scale", "_act_pre_scale")
_AGAIN = "Finalize again from the source"

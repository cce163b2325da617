"""torchao's flattened tensors, understood from safetensors metadata alone.

torchao writes a quantized tensor ``P.weight`` as ``P._weight_qdata``, ``P._weight_scale``, … and describes it
in the header metadata under ``P.weight`` as JSON: ``{"_type", "_data", "_tensor_data_names"}``
(torchao/prototype/safetensors/safetensors_support.py). ``tensor_names`` lists all described tensors.
"""

from __future__ import annotations

import json
from typing import Any

from loadstone.artifact.files import Sink, refuse
from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.artifact.hints import QUANTO_REMEDY
from loadstone.artifact.torchao.checks import (
    SUBCLASSES,
    FlatTensor,
    check_description,
    check_shapes,
    looks_flattened,
    part_name,
    unknown_class_hint,
)
from loadstone.errors import ArtifactError


def tensor_names(metadata: dict[str, str]) -> list[str]:
    """torchao's own list of the tensors that a header's metadata describes, empty when there is none."""
    try:
        names = json.loads(metadata.get("tensor_names", "[]"))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ArtifactError("header metadata 'tensor_names' is not a JSON list of strings", _AGAIN)
    return names


def described_names(metadata: dict[str, str]) -> list[str]:
    """Names that the header metadata describes, empty when torchao wrote none."""
    if "tensor_names" in metadata:
        return tensor_names(metadata)
    return [k for k, v in metadata.items() if k != "format" and v.startswith('{"_type"')]


def flat_tensors(
    metadata: dict[str, str], tensors: dict[str, TensorInfo], sink: Sink = refuse
) -> dict[str, FlatTensor]:
    """All quantized tensors of a directory; raises `ArtifactError` for one that is incomplete or of unknown
    class.

    Keys that look like parts of a quantized tensor but that no description claims are refused too: their
    description was lost, and the raw integers must never be taken for weights. With another ``sink``,
    problems go there and the tensor is left out.
    """
    found: dict[str, FlatTensor] = {}
    claimed: set[str] = set()
    # Thousands of layers share a handful of descriptions and shapes: each is parsed and checked once.
    parsed: dict[str, dict[str, Any]] = {}
    checked: set[tuple[Any, ...]] = set()
    described = described_names(metadata)
    stored_under = _renamed(described, metadata, tensors)
    for described_as in described:
        name = stored_under.get(described_as, described_as)
        try:
            flat = _flat_tensor(name, metadata.get(described_as), tensors, parsed, claimed)
            if flat is None:
                continue
            key = (flat.metadata, *((k, p.dtype, p.shape) for k, p in flat.parts.items()))
            if key not in checked:
                check_description(flat)
                check_shapes(flat)
                checked.add(key)
            found[name] = flat
        except ArtifactError as error:
            sink(error)
    for stored, tensor in tensors.items():
        if stored.endswith((".weight._data", ".weight._scale")):
            sink(ArtifactError(f"{tensor.file}: '{stored}' was written by quanto", QUANTO_REMEDY))
            break
        if stored not in claimed and looks_flattened(stored):
            sink(
                ArtifactError(
                    f"{tensor.file}: '{stored}' is part of a quantized tensor that no metadata describes",
                    "The safetensors metadata was lost (rewritten by another tool?): finalize again",
                )
            )
    return found


def _flat_tensor(
    name: str,
    text: str | None,
    tensors: dict[str, TensorInfo],
    parsed: dict[str, dict[str, Any]],
    claimed: set[str],
) -> FlatTensor | None:
    if text is None:
        raise ArtifactError(f"header metadata lists {ascii(name)[:200]} and does not describe it", _AGAIN)
    if text not in parsed:
        parsed[text] = _parse(name, text)
    description = parsed[text]
    kind = description["_type"]
    if kind == "Tensor":
        # transformers describes a tied lm_head too and stores it nowhere: absence is for the loader to judge.
        return None
    data_names = description["_tensor_data_names"]
    keys = [part_name(name, data_name) for data_name in data_names]
    # Claimed even when refused below: one problem a tensor, not one a part.
    claimed.update(keys)
    if kind not in SUBCLASSES:
        raise ArtifactError(
            f"tensor {ascii(name)[:200]} has the unknown quantized class {ascii(kind)[:80]}",
            unknown_class_hint(kind),
        )
    for key in keys:
        if key not in tensors:
            raise ArtifactError(f"quantized tensor '{name}' lacks its part {ascii(key)[:200]}", _AGAIN)
    if name in tensors:
        raise ArtifactError(
            f"{tensors[name].file}: tensor '{name}' is stored both plain and quantized", _AGAIN
        )
    if len(set(keys)) != len(keys):
        raise ArtifactError(f"the metadata of '{name}' names a part twice", _AGAIN)
    parts = {data_name: tensors[key] for data_name, key in zip(data_names, keys, strict=True)}
    return FlatTensor(name, kind, description["_data"], parts, text)


def _renamed(
    described: list[str], metadata: dict[str, str], tensors: dict[str, TensorInfo]
) -> dict[str, str]:
    """Names under which described tensors are stored, where these are others.

    For models whose checkpoints have older names (Gemma 3), transformers stores the parts under those and describes
    them by the model's own. The two share their last components (``layers.0.self_attn.k_proj``): the longest that one
    description and one stored tensor alone have in common pairs them.
    """
    lost = {
        name
        for name in described
        if name not in tensors
        and '"_tensor_data_names"' in metadata.get(name, "")
        and part_name(name, "qdata") not in tensors
    }
    if not lost:
        return {}
    known = {part_name(name, "qdata") for name in described}
    found: dict[str, str] = {}
    homeless = {
        f"{module}.{parameter.removesuffix('_qdata')}"
        for key in tensors
        if key not in known and key.endswith("_qdata")
        for module, _, parameter in (key.rpartition("._"),)
        if module
    }
    for length in range(_LONGEST, 1, -1):
        if not lost or not homeless:
            break
        ours, theirs = (_by_ending(names, length) for names in (lost, homeless))
        for ending, names in ours.items():
            if len(names) == 1 and len(theirs.get(ending, ())) == 1:
                found[names[0]] = theirs[ending][0]
        lost -= found.keys()
        homeless -= set(found.values())
    return found


def _by_ending(names: set[str], length: int) -> dict[tuple[str, ...], list[str]]:
    """The names that have ``length`` components or more, by their last ones."""
    endings: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        components = name.split(".")
        if len(components) >= length:
            endings.setdefault(tuple(components[-length:]), []).append(name)
    return endings


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
        raise ArtifactError(f"the header metadata of tensor {ascii(name)[:200]} is malformed", _AGAIN)
    return description


_AGAIN = "Finalize again from the source"
# Components of a parameter's name that are compared; models have about ten.
_LONGEST = 24

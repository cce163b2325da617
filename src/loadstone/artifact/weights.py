"""The weight files of a model directory: which they are, and every tensor in them, from headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from loadstone.artifact.headers import ShardHeader, TensorInfo, read_header
from loadstone.errors import ArtifactError

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """``format`` is ``safetensors`` or ``bin``; ``index`` names the index file of a sharded layout."""

    format: str
    files: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorTable:
    """Every tensor of a safetensors directory, with the headers' merged metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    headers: tuple[ShardHeader, ...]


def find_weights(directory: Path) -> WeightFiles | None:
    """The weight files a load would read, in transformers' order of preference; None when there are none.

    Raises `ArtifactError` for an index that is malformed, leaves the directory, or names absent files.
    """
    for fmt, single, index in (("safetensors", SAFETENSORS, SAFETENSORS_INDEX), ("bin", BIN, BIN_INDEX)):
        if (directory / single).is_file():
            check_inside(directory, single)
            stale = (f"{index} is ignored: {single} is the whole model",) if (directory / index).exists() else ()
            return WeightFiles(fmt, (single,), notes=stale)
        if (directory / index).is_file():
            weight_map = _read_index(directory, index)
            files = tuple(sorted(set(weight_map.values())))
            for file in files:
                if not (directory / file).is_file():
                    raise ArtifactError(
                        f"{index} names '{file}', which is not there", "Copy the missing shard or finalize again"
                    )
            return WeightFiles(fmt, files, index, weight_map)
    return None


def read_tensors(directory: Path, weights: WeightFiles) -> TensorTable:
    """Headers of all shards, held against the index; raises `ArtifactError` for any disagreement."""
    headers = tuple(read_header(directory / file) for file in weights.files)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise ArtifactError(
                    f"tensor '{name}' is in both {tensors[name].file} and {header.file}",
                    "Remove the stale shard or finalize again",
                )
            tensors[name] = tensor
        for key, value in header.metadata.items():
            if key not in ("format", "tensor_names") and metadata.get(key, value) != value:
                raise ArtifactError(f"{header.file}: metadata of '{key}' differs between shards", "Finalize again")
            metadata[key] = value
    if weights.index is not None:
        for name, file in weights.weight_map.items():
            if name not in tensors:
                raise ArtifactError(f"{file}: tensor '{name}' is named by {weights.index} and is not in it", _AGAIN)
            if tensors[name].file != file:
                raise ArtifactError(f"{weights.index} puts '{name}' in {file}, it is in {tensors[name].file}", _AGAIN)
        for name, tensor in tensors.items():
            if name not in weights.weight_map:
                raise ArtifactError(f"{tensor.file}: tensor '{name}' is not in {weights.index}", _AGAIN)
    return TensorTable(tensors, metadata, headers)


def check_inside(directory: Path, name: str) -> Path:
    """The path of ``name`` in ``directory``; raises `ArtifactError` when it is, or links, outside.

    A link to another file of the same Hugging Face cache (``blobs/`` beside ``snapshots/``) is allowed.
    """
    parts = PurePosixPath(name).parts
    if not name or "\\" in name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in parts:
        raise ArtifactError(f"the file name '{name}' leaves the directory", "Do not trust this artifact")
    path = directory / name
    root = directory.resolve()
    target = path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(a) for a in allowed):
        raise ArtifactError(f"'{name}' is a link that leaves the directory (to {target})", "Copy the file itself")
    return path


def _read_index(directory: Path, index: str) -> dict[str, str]:
    try:
        content = json.loads(check_inside(directory, index).read_bytes())
        weight_map = content["weight_map"]
        valid = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise ArtifactError(f"{index}: not a valid index (a JSON object with a 'weight_map')", _AGAIN)
    if not weight_map:
        raise ArtifactError(f"{index}: the weight_map is empty", _AGAIN)
    for file in set(weight_map.values()):
        check_inside(directory, file)
    return weight_map


_AGAIN = "Finalize or download the directory again"

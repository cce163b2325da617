"""The weight files of a model directory: which they are, and every tensor in them, from headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loadstone.artifact.files import Sink, check_inside, is_file, read_json, refuse
from loadstone.artifact.formats.safetensors import ShardHeader, TensorInfo, read_header
from loadstone.artifact.torchao.tensors import tensor_names
from loadstone.errors import ArtifactError

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
FSDP_BIN = "pytorch_model_fsdp.bin"
DCP_METADATA = ".metadata"
MAX_SHARDS = 10_000


@dataclass(frozen=True)
class WeightFiles:
    """``format`` is ``safetensors``, ``bin`` or ``dcp``; ``index`` names the index file of a sharded layout.

    For ``dcp`` (torch distributed checkpoint) ``folder`` is where its ``.metadata`` lies.
    """

    format: str
    files: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    total_size: int | None = None
    folder: str = "."


@dataclass(frozen=True)
class TensorTable:
    """Every tensor of a safetensors directory, with the headers' merged metadata."""

    tensors: dict[str, TensorInfo] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    headers: tuple[ShardHeader, ...] = field(repr=False, default=())


def find_weights(directory: Path, sink: Sink = refuse, named: object = None) -> WeightFiles | None:
    """The weight files a load would read, in transformers' order of preference; None when there are none.

    ``named`` is what config.json says under ``transformers_weights``: that file or index and no other. Raises
    `ArtifactError` for an index that is malformed, leaves the directory, or names absent files.
    """
    if named is not None:
        return _named(directory, named, sink)
    for fmt, single, index in (("safetensors", SAFETENSORS, SAFETENSORS_INDEX), ("bin", BIN, BIN_INDEX)):
        if is_file(directory / single):
            check_inside(directory, single)
            if is_file(directory / index):
                _refuse_two_models(directory, single, index, sink)
            stale = [f"{index} is ignored: {single} is the whole model"] if is_file(directory / index) else []
            return WeightFiles(fmt, (single,), notes=(*stale, *_strays(directory, fmt, (single,))))
        if is_file(directory / index):
            return _sharded(directory, fmt, index, sink)
    if is_file(directory / FSDP_BIN):
        check_inside(directory, FSDP_BIN)
        return WeightFiles("bin", (FSDP_BIN,))
    folder = find_dcp(directory)
    if folder is not None:
        index = DCP_METADATA if folder == "." else f"{folder}/{DCP_METADATA}"
        return WeightFiles("dcp", (index,), index, folder=folder)
    return None


def _refuse_two_models(directory: Path, single: str, index: str, sink: Sink) -> None:
    """Report a file that would be loaded in place of the shards of an index that does not name it."""
    try:
        named = set(_read_index(directory, index)[0].values())
    except ArtifactError:  # no index of anything: the single file is the model
        return
    if single not in named and any(is_file(directory / name) for name in named if "\0" not in name):
        what = f"{single} is not named by {index}, and would be loaded in place of the shards that it names"
        sink(ArtifactError(what, f"Remove {single}, or the index and its shards"))


def find_dcp(directory: Path) -> str | None:
    """The folder in ``directory`` that holds the model's distributed checkpoint.

    ``pytorch_model_fsdp_0``, ``.``, …
    """
    for folder in ("pytorch_model_fsdp_0", ".", "model"):
        if is_file(directory / folder / DCP_METADATA):
            return folder
    return None


def _named(directory: Path, name: object, sink: Sink) -> WeightFiles:
    known = isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json"))
    if not isinstance(name, str) or not known:
        what = f"config.json: transformers_weights is {ascii(name)[:80]}, not a safetensors file"
        raise ArtifactError(what, "Restore config.json from the source")
    check_inside(directory, name)
    if not is_file(directory / name):
        raise ArtifactError(
            f"config.json names the weights '{name[:200]}', which are not there", "Copy the file"
        )
    if name.endswith(".index.json"):
        return _sharded(directory, "safetensors", name, sink)
    return WeightFiles("safetensors", (name,), notes=_strays(directory, "safetensors", (name,)))


def _sharded(directory: Path, fmt: str, index: str, sink: Sink) -> WeightFiles:
    weight_map, total_size = _read_index(directory, index)
    files = []
    for file in sorted(set(weight_map.values())):
        try:
            check_inside(directory, file)
            if not is_file(directory / file):
                raise ArtifactError(
                    f"{index} names '{file[:200]}', which is not there",
                    "Copy the missing shard or finalize again",
                )
            files.append(file)
        except ArtifactError as error:
            sink(error)
    return WeightFiles(
        fmt, tuple(files), index, weight_map, _strays(directory, fmt, tuple(files)), total_size=total_size
    )


def read_tensors(directory: Path, weights: WeightFiles, sink: Sink = refuse) -> TensorTable:
    """Headers of all shards, held against the index; raises `ArtifactError` for any disagreement."""
    headers: list[ShardHeader] = []
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    described: dict[str, None] = {}
    for file in weights.files:
        try:
            header = read_header(directory / file, sink, file)
            for name in tensor_names(header.metadata):
                described[name] = None
        except ArtifactError as error:
            sink(error)
            continue
        for name, tensor in header.tensors.items():
            if name in tensors:
                where = f"tensor '{name}' is in both {tensors[name].file} and {file}"
                sink(ArtifactError(where, "Remove the stale shard or finalize again"))
            tensors.setdefault(name, tensor)
        for key, value in header.metadata.items():
            if key not in ("format", "tensor_names") and metadata.setdefault(key, value) != value:
                sink(
                    ArtifactError(
                        f"{file}: metadata of {ascii(key)[:200]} differs between shards", "Finalize again"
                    )
                )
            metadata.setdefault(key, value)
        if len(weights.files) > 1 and metadata.keys() == header.metadata.keys():
            # transformers repeats all metadata in each shard: one copy is enough to hold.
            header = replace(header, metadata=metadata)
        headers.append(header)
    if described:
        metadata["tensor_names"] = json.dumps(list(described))
    if len(headers) == len(weights.files):
        check_index(weights, {name: tensor.file for name, tensor in tensors.items()}, sink)
    return TensorTable(tensors, metadata, tuple(headers))


def check_index(weights: WeightFiles, stored: dict[str, str], sink: Sink) -> None:
    """Reports where the index and ``stored`` (tensor name -> file that has it) disagree."""
    if weights.index is None:
        return
    present = set(weights.files)
    for name, file in weights.weight_map.items():
        if file not in present:
            continue
        if name not in stored:
            what = f"{file}: tensor {ascii(name)[:200]} is named by {weights.index} and is not in it"
            sink(ArtifactError(what, _AGAIN))
        elif stored[name] != file:
            sink(ArtifactError(f"{weights.index} puts '{name}' in {file}, it is in {stored[name]}", _AGAIN))
    for name, file in stored.items():
        if name not in weights.weight_map:
            sink(ArtifactError(f"{file}: tensor '{name}' is not in {weights.index}", _AGAIN))


def _strays(directory: Path, fmt: str, files: tuple[str, ...]) -> tuple[str, ...]:
    """Notes on weight files that lie beside those that are read."""
    pattern = "*.safetensors" if fmt == "safetensors" else "*.bin"
    # What trainers leave under such names: optimizer state, schedules, arguments.
    known = (
        "optimizer",
        "scheduler",
        "training_args",
        "random_states",
        "adapter_",
        "custom_checkpoint",
        "sampler",
        "fakequant_state",
    )
    found = sorted(
        p.name for p in directory.glob(pattern) if p.name not in files and not p.name.startswith(known)
    )
    if not found:
        return ()
    names = ", ".join(ascii(n)[1:-1] for n in found[:3]) + (
        f" and {len(found) - 3} more" if len(found) > 3 else ""
    )
    return (f"{names}: not part of the model, ignored",)


def _read_index(directory: Path, index: str) -> tuple[dict[str, str], int | None]:
    content = read_json(check_inside(directory, index))
    weight_map: Any = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ArtifactError(f"{index}: not a valid index (a JSON object with a 'weight_map')", _AGAIN)
    if not weight_map:
        raise ArtifactError(f"{index}: the weight_map is empty", _AGAIN)
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise ArtifactError(f"{index}: names over {MAX_SHARDS} files", "Do not trust this artifact")
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, int(total) if isinstance(total, (int, float)) and 0 <= total < 2**63 else None


_AGAIN = "Finalize or download the directory again"

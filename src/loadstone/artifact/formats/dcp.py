"""What a torch distributed checkpoint holds (FSDP, accelerate), read without torch and without running its
pickle.

Such a checkpoint is a folder with ``.metadata``, a pickle that says which slice of which tensor lies where,
and ``__<rank>_<n>.distcp`` files with the slices, each of them a ``torch.save`` of one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.files import Sink, check_inside, file_size, is_file, open_regular, refuse
from loadstone.artifact.formats.bin import TORCH_DTYPES, check_names
from loadstone.artifact.formats.inert_pickle import Global, MalformedPickle, Node, read_pickle
from loadstone.artifact.formats.safetensors import DTYPE_BITS, TensorInfo
from loadstone.artifact.formats.weights import DCP_METADATA
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    import torch

# Instructions of the pickle: about 40 for each slice of each rank.
_MAX_STEPS = 5_000_000
MAX_METADATA_BYTES = 64_000_000
# Names under which trainers nest the model's own state dict; everything else in the checkpoint is passed
# over.
_MODEL_KEYS = ("model", "state_dict", "module")


@dataclass(frozen=True, slots=True)
class DcpChunk:
    """One slice of a tensor: ``sizes`` elements at ``offsets``, in bytes ``begin`` to ``end`` of ``file``."""

    file: str
    begin: int
    end: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class DcpContents:
    """``tensors`` and ``chunks`` by the name in the model's state dict.

    ``keys``: that name -> key in the checkpoint.
    """

    folder: str
    tensors: dict[str, TensorInfo] = field(repr=False)
    chunks: dict[str, tuple[DcpChunk, ...]] = field(repr=False)
    keys: dict[str, str] = field(repr=False)
    files: tuple[str, ...] = ()


def read_dcp(directory: Path, folder: str, sink: Sink = refuse) -> DcpContents:
    """The tensors of the checkpoint in ``directory/folder``; raises `ArtifactError` when it is damaged."""
    label = f"{folder}/{DCP_METADATA}" if folder != "." else DCP_METADATA
    path = check_inside(directory, label)
    if file_size(path) > MAX_METADATA_BYTES:
        raise ArtifactError(
            f"{label}: over the limit of {MAX_METADATA_BYTES} bytes", "Save the weights as safetensors"
        )
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_METADATA_BYTES)
        metadata, names = read_pickle(raw, _MAX_STEPS)
    except (MalformedPickle, OSError) as error:
        raise ArtifactError(f"{label}: cannot be read ({error})", "Copy the checkpoint again") from None
    check_names(label, names)
    reader = _Reader(directory, folder, label, sink)
    return reader.read(metadata)


def load_tensor(directory: Path, info: TensorInfo, chunks: tuple[DcpChunk, ...]) -> torch.Tensor:
    """One whole tensor on the CPU, from its slices; raises `ArtifactError` when a slice is damaged."""
    import io

    import torch

    from loadstone.artifact.torchao.flatten import torch_dtype

    whole = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    for chunk in chunks:
        with open_regular(directory / chunk.file) as file:
            file.seek(chunk.begin)
            raw = file.read(chunk.end - chunk.begin)
        try:
            part = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
            place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            if tuple(part.shape) != tuple(chunk.sizes) or part.dtype != whole.dtype:
                raise ValueError(
                    f"it is {part.dtype} {list(part.shape)}, not {whole.dtype} {list(chunk.sizes)}"
                )
            whole[place].copy_(part)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{chunk.file}: the slice of '{info.name}' at {list(chunk.offsets)} cannot be read ({reason})",
                "Copy the checkpoint again",
            ) from None
    return whole


class _Reader:
    def __init__(self, directory: Path, folder: str, label: str, sink: Sink) -> None:
        self.directory, self.folder, self.label, self.sink = directory, folder, label, sink
        self.sizes: dict[str, int] = {}

    def read(self, metadata: Any) -> DcpContents:
        described = self.field(metadata, "state_dict_metadata")
        names = _model_names(described, metadata.attribute("planner_data"))
        places = self.places(metadata)
        tensors: dict[str, TensorInfo] = {}
        chunks: dict[str, tuple[DcpChunk, ...]] = {}
        for key, name in names.items():
            try:
                chunks[name] = self.chunks(key, described[key], places)
                tensors[name] = self.tensor(name, described[key], chunks[name])
            except ArtifactError as error:
                self.sink(error)
        if not tensors:
            self.sink(
                ArtifactError(
                    f"{self.label}: holds no tensors of a model", "Name a directory that has weights"
                )
            )
        files = tuple(sorted({c.file for found in chunks.values() for c in found}))
        return DcpContents(
            self.folder, tensors, chunks, {n: k for k, n in names.items() if n in tensors}, files
        )

    def field(self, node: Any, name: str) -> dict[str, Any]:
        value = node.attribute(name) if isinstance(node, Node) else None
        if not isinstance(value, Node):
            raise ArtifactError(
                f"{self.label}: not the metadata of a distributed checkpoint", "Copy the checkpoint again"
            )
        return value.pairs()

    def places(self, metadata: Node) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
        """(key, offsets of the slice) -> (file, begin, end)."""
        self.field(metadata, "storage_data")
        found = {}
        for item in metadata.attribute("storage_data").items:
            index, info = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
            if not isinstance(index, Node) or not isinstance(info, Node):
                continue
            key, file = index.attribute("fqn"), info.attribute("relative_path")
            begin, length = info.attribute("offset"), info.attribute("length")
            if info.attribute("transform_descriptors"):
                raise ArtifactError(
                    f"{self.label}: its slices are compressed or encrypted", "Save it without"
                )
            if isinstance(key, str) and isinstance(file, str) and type(begin) is int and type(length) is int:
                found[key, _size(index.attribute("offset")) or ()] = (file, begin, begin + length)
        return found

    def chunks(self, key: str, node: Node, places: dict[Any, tuple[str, int, int]]) -> tuple[DcpChunk, ...]:
        total, covered, found = _size(node.attribute("size")), 0, []
        listed = node.attribute("chunks")
        if total is None or not isinstance(listed, list):
            raise ArtifactError(
                f"{self.label}: tensor {ascii(key)[:200]} is malformed", "Copy the checkpoint again"
            )
        for chunk in listed:
            offsets, sizes = (_size(chunk.attribute(n)) if isinstance(chunk, Node) else None for n in _CHUNK)
            inside = offsets is not None and sizes is not None and len(offsets) == len(sizes) == len(total)
            if not inside or any(
                o + s > n for o, s, n in zip(offsets or (), sizes or (), total, strict=True)
            ):
                raise ArtifactError(
                    f"{self.label}: a slice of {ascii(key)[:200]} lies outside of it",
                    "Copy the checkpoint again",
                )
            assert offsets is not None and sizes is not None
            # A tensor in one piece may be filed without an offset.
            place = places.get((key, offsets)) or (places.get((key, ())) if len(listed) == 1 else None)
            if place is None:
                raise ArtifactError(
                    f"{self.label}: no file holds {ascii(key)[:200]}", "Copy the checkpoint again"
                )
            found.append(DcpChunk(self.check_file(key, *place), place[1], place[2], offsets, sizes))
            covered += prod(sizes)
        if covered != prod(total) or not _is_grid(found, total):
            raise ArtifactError(
                f"{self.label}: slices of {ascii(key)[:200]} hold {covered} elements and do not make up its "
                f"{prod(total)} side by side",
                "Copy the files of all ranks",
            )
        return tuple(found)

    def check_file(self, key: str, file: str, begin: int, end: int) -> str:
        name = file if self.folder == "." else f"{self.folder}/{file}"
        if name not in self.sizes:
            path = check_inside(self.directory, name)
            self.sizes[name] = file_size(path) if is_file(path) else -1
        if self.sizes[name] < 0:
            raise ArtifactError(
                f"{name}: missing, it holds {ascii(key)[:200]}", "Copy the files of all ranks"
            )
        if not 0 <= begin <= end <= self.sizes[name]:
            raise ArtifactError(
                f"{name}: truncated, {ascii(key)[:200]} ends at byte {end} of {self.sizes[name]}",
                "Copy the file again",
            )
        return name

    def tensor(self, name: str, node: Node, chunks: tuple[DcpChunk, ...]) -> TensorInfo:
        properties = node.attribute("properties")
        state = properties.state if isinstance(properties, Node) else None
        kind = (
            state[0] if isinstance(state, tuple) and state else state.pairs().get("dtype") if state else None
        )
        dtype = TORCH_DTYPES.get(kind.path.removeprefix("torch.")) if isinstance(kind, Global) else None
        if dtype is None or not name.isprintable():
            raise ArtifactError(
                f"{self.label}: tensor {ascii(name)[:200]} has no known dtype", "Copy it again"
            )
        shape = _size(node.attribute("size")) or ()
        nbytes = (prod(shape) * DTYPE_BITS[dtype] + 7) // 8
        return TensorInfo(name, dtype, shape, chunks[0].file if chunks else self.label, 0, nbytes)


_CHUNK = ("offsets", "sizes")


def _is_grid(chunks: list[DcpChunk], total: tuple[int, ...]) -> bool:
    """Whether slices are different cells of a grid over a tensor, as sharding makes them.

    Such slices share no element, so those that hold as many elements as the tensor leave none out.
    """
    cells = [chunk for chunk in chunks if prod(chunk.sizes)]
    for dimension, size in enumerate(total):
        at = 0
        for offset, length in sorted({(c.offsets[dimension], c.sizes[dimension]) for c in cells}):
            if offset != at:
                return False
            at += length
        if at != size and cells:
            return False
    return len({chunk.offsets for chunk in chunks}) == len(chunks)


def _model_names(described: dict[str, Any], planner: Any) -> dict[str, str]:
    """Checkpoint key -> state dict name, for the tensors of the model (not the optimizer's)."""
    paths = planner.pairs() if isinstance(planner, Node) else {}
    found: dict[str, str] = {}
    for key, node in described.items():
        if not isinstance(node, Node) or not node.path.endswith(".TensorStorageMetadata"):
            continue
        path = paths.get(key)
        # torch records how it flattened nested dicts: ("model", "model.norm.weight").
        if isinstance(path, tuple) and len(path) == 2 and all(isinstance(p, str) for p in path):
            if path[0] in _MODEL_KEYS:
                found[key] = path[1]
        elif not isinstance(path, tuple) or len(path) == 1:
            found[key] = key
    return found


def _size(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Node) and isinstance(value.args, tuple) and len(value.args) == 1:
        value = value.args[0]
    good = (
        isinstance(value, tuple)
        and len(value) <= 64
        # Below the modulus of int hashes, so that no chosen sizes can collide in a dict.
        and all(type(n) is int and 0 <= n < 2**60 for n in value)
    )
    return value if good else None

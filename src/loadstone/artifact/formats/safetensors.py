"""Safetensors headers, read without torch: names, dtypes, shapes and where each tensor's bytes lie.

Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length N, N bytes of
JSON, then the data; ``data_offsets`` are relative to the data's start). What the format forbids is refused
here with the file and the tensor named: a header over 100 MB, truncated data, overlapping or uncovered bytes,
sizes that do not follow from dtype and shape.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from loadstone.artifact.files import (
    MAX_JSON_ITEMS,
    Sink,
    file_size,
    open_regular,
    refuse,
    too_many_items,
    translated,
)
from loadstone.artifact.hints import LFS_REMEDY, is_lfs_pointer
from loadstone.errors import ArtifactError

MAX_HEADER_BYTES = 100_000_000
# Bits per element of every dtype the format names (F4 packs two to a byte).
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
MAX_DIM = 2**63 - 1
# torch's own limit. A product of a hundred thousand dimensions takes minutes, and too many digits to print.
MAX_DIMS = 64


class TensorInfo(NamedTuple):
    """One stored tensor: ``dtype`` as the format spells it (``BF16``), ``begin``/``end`` file offsets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ShardHeader:
    """One safetensors file: its tensors by name and its string-to-string metadata."""

    file: str
    tensors: dict[str, TensorInfo] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    file_bytes: int


def read_header(path: Path, sink: Sink = refuse, name: str | None = None) -> ShardHeader:
    """Read and check the header of one safetensors file; raises `ArtifactError` naming file and tensor.

    With another ``sink``, problems of single tensors go there and the tensor is left out; an unreadable
    header raises all the same. ``name`` is what to call the file (default: its last path component).
    """
    name = path.name if name is None else name
    file_bytes = file_size(path)
    raw = _read_raw(path, name, file_bytes)
    if too_many_items(raw):
        raise ArtifactError(f"{name}: the header holds over {MAX_JSON_ITEMS} items", _HOSTILE)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except _DuplicateKey as error:
        raise ArtifactError(f"{name}: {error.args[0]!a} is duplicated in the header", _RECOPY) from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{name}: the header is not valid JSON", _RECOPY) from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{name}: the header is not a JSON object", _RECOPY)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{name}: __metadata__ must map strings to strings", _RECOPY)
    base = 8 + len(raw)
    tensors = {}
    for key, entry in header.items():
        try:
            tensors[key] = _tensor(name, key, entry, base)
        except ArtifactError as error:
            sink(error)
    if len(tensors) == len(header):
        _check_extents(name, tensors.values(), base, file_bytes, sink)
    return ShardHeader(name, tensors, metadata, file_bytes)


@contextmanager
def open_tensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """A file opened by safetensors' own reader, on the CPU.

    Raises `ArtifactError` naming the file, here and within the block, when it is no longer what its header was.
    """
    from safetensors import SafetensorError, safe_open

    file_size(path)
    with translated(f"{path.name}: cannot be read", _RECOPY):
        handle = safe_open(path, framework=framework, device="cpu")
    try:
        with handle:
            yield handle
    except SafetensorError as error:
        raise ArtifactError(f"{path.name}: cannot be read ({error})", _RECOPY) from None


def _read_raw(path: Path, name: str, file_bytes: int) -> bytes:
    try:
        with open_regular(path) as file:
            prefix = file.read(8)
            if prefix == b"version " and is_lfs_pointer(prefix + file.read(16)):
                raise ArtifactError(f"{name}: a git-LFS pointer, not the file", LFS_REMEDY)
            if len(prefix) < 8:
                raise ArtifactError(
                    f"{name}: {file_bytes} bytes is too short for a safetensors file", _RECOPY
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise ArtifactError(
                    f"{name}: header claims {length} bytes, over the limit of {MAX_HEADER_BYTES}", _HOSTILE
                )
            if 8 + length > file_bytes:
                raise ArtifactError(
                    f"{name}: truncated, the header needs {8 + length} bytes and the file has {file_bytes}",
                    _RECOPY,
                )
            raw = file.read(length)
    except OSError as error:
        raise ArtifactError(
            f"{name}: cannot be read ({error.strerror})", "Check the file and its permissions"
        ) from None
    if len(raw) < length:
        raise ArtifactError(f"{name}: truncated while it was read", _RECOPY)
    return raw


def _tensor(file: str, key: str, entry: Any, base: int) -> TensorInfo:
    if not key.isprintable():
        raise ArtifactError(
            f"{file}: the tensor name {ascii(key)[:200]} holds unprintable characters", _HOSTILE
        )
    whole = True
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        for number in (*shape, begin, end):
            if type(number) is not int or not 0 <= number <= MAX_DIM:
                whole = False
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str) or begin > end or len(shape) > MAX_DIMS:
        raise ArtifactError(f"{file}: tensor '{key}' has a malformed header entry", _RECOPY)
    if dtype not in DTYPE_BITS:
        raise ArtifactError(
            f"{file}: tensor '{key}' has the unknown dtype {ascii(dtype)[:40]}", "Update the file"
        )
    expected = (prod(shape) * DTYPE_BITS[dtype] + 7) // 8
    if end - begin != expected:
        raise ArtifactError(
            f"{file}: tensor '{key}' holds {end - begin} bytes, {list(shape)} of {dtype} needs {expected}",
            _RECOPY,
        )
    return TensorInfo(key, dtype, shape, file, base + begin, base + end)


def _check_extents(file: str, tensors: Iterable[TensorInfo], base: int, file_bytes: int, sink: Sink) -> None:
    position = base
    truncated: list[TensorInfo] = []
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            what = "overlaps another tensor" if tensor.begin < position else "leaves unnamed bytes before it"
            sink(
                ArtifactError(
                    f"{file}: tensor '{tensor.name}' {what} (offset {tensor.begin - base})", _RECOPY
                )
            )
        position = max(position, tensor.end)
        if tensor.end > file_bytes:
            truncated.append(tensor)
    if truncated:
        more = f" (and {len(truncated) - 1} more)" if len(truncated) > 1 else ""
        sink(
            ArtifactError(
                f"{file}: truncated, tensor '{truncated[0].name}' ends at byte {truncated[0].end} and the "
                f"file has {file_bytes}{more}",
                _RECOPY,
            )
        )
    elif position != file_bytes:
        extra = file_bytes - position
        sink(ArtifactError(f"{file}: {extra} bytes after the last tensor belong to none", _RECOPY))


class _DuplicateKey(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return result


_RECOPY = "Copy or download the file again"
_HOSTILE = "This is not a safetensors file, or it was made to do harm"

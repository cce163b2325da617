"""Safetensors headers, read without torch: names, dtypes, shapes and where each tensor's bytes lie.

Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length N, N bytes of JSON,
then the data; ``data_offsets`` are relative to the data's start). What the format forbids is refused here with
the file and the tensor named: a header over 100 MB, truncated data, overlapping or uncovered bytes, sizes that
do not follow from dtype and shape.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loadstone.errors import ArtifactError

MAX_HEADER_BYTES = 100_000_000

# Bits per element of every dtype the format names (F4 packs two to a byte).
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: ``dtype`` in the format's spelling (``BF16``), ``begin``/``end`` as offsets in the file."""

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
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of one safetensors file; raises `ArtifactError` naming file and tensor."""
    name = path.name
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ArtifactError(f"{name}: {file_bytes} bytes is too short for a safetensors file", _RECOPY)
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise ArtifactError(
                    f"{name}: header claims {length} bytes, over the limit of {MAX_HEADER_BYTES}",
                    "This is no safetensors file, or a hostile one",
                )
            if 8 + length > file_bytes:
                raise ArtifactError(
                    f"{name}: truncated, the header needs {8 + length} bytes and the file has {file_bytes}", _RECOPY
                )
            raw = file.read(length)
    except OSError as error:
        raise ArtifactError(f"{name}: cannot be read ({error.strerror})", "Check the file and its permissions") from None
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except _DuplicateKey as error:
        raise ArtifactError(f"{name}: tensor '{error.args[0]}' stands twice in the header", _RECOPY) from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{name}: the header is not valid JSON", _RECOPY) from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{name}: the header is no JSON object", _RECOPY)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{name}: __metadata__ must map strings to strings", _RECOPY)
    base = 8 + length
    tensors = {key: _tensor(name, key, entry, base) for key, entry in header.items()}
    _check_extents(name, tensors.values(), base, file_bytes)
    return ShardHeader(name, tensors, metadata, file_bytes)


def _tensor(file: str, key: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ArtifactError(f"{file}: tensor '{key}' has a malformed header entry", _RECOPY)
    if dtype not in DTYPE_BITS:
        raise ArtifactError(f"{file}: tensor '{key}' has the unknown dtype '{dtype}'", "Update safetensors or the file")
    expected = (prod(shape) * DTYPE_BITS[dtype] + 7) // 8
    if end - begin != expected:
        raise ArtifactError(
            f"{file}: tensor '{key}' holds {end - begin} bytes, its shape {list(shape)} of {dtype} needs {expected}",
            _RECOPY,
        )
    return TensorInfo(key, dtype, shape, file, base + begin, base + end)


def _check_extents(file: str, tensors: Any, base: int, file_bytes: int) -> None:
    position = base
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            what = "overlaps another tensor" if tensor.begin < position else "leaves unnamed bytes before it"
            raise ArtifactError(f"{file}: tensor '{tensor.name}' {what} (offset {tensor.begin - base})", _RECOPY)
        position = tensor.end
        if position > file_bytes:
            raise ArtifactError(
                f"{file}: truncated, tensor '{tensor.name}' ends at byte {position} and the file has {file_bytes}",
                _RECOPY,
            )
    if position != file_bytes:
        raise ArtifactError(f"{file}: {file_bytes - position} bytes after the last tensor belong to none", _RECOPY)


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

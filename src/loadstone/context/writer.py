"""A context's files, written whole or not at all, and tensor by tensor: saving holds no second copy of a context.

safetensors' own writer wants all tensors in one dictionary on the CPU. Layout as it lays it
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loadstone._version import __version__
from loadstone.artifact.context_file import CONTEXT_JSON, CONTEXT_TENSORS, FORMAT_VERSIONS, digest, is_context
from loadstone.artifact.manifest import sha256_file
from loadstone.context.fingerprint import tensor_bytes
from loadstone.errors import UsageError
from loadstone.quantization.flatten import dtype_name


@dataclass(frozen=True)
class Part:
    """One tensor of a file: its header entry, and what gives its bytes when its turn comes. Bytes of their own ("U8")
    may turn out fewer than ``nbytes``; ``shape`` follows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[Any]]


def plain_parts(tensors: dict[str, Tensor]) -> list[Part]:
    """Tensors as they are, in safetensors' order: by falling alignment, then name."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    return [
        Part(name, dtype_name(t.dtype), tuple(t.shape), t.nbytes, lambda t=t: [tensor_bytes(t)])  # type: ignore[misc]
        for name, t in ordered
    ]


def write_context(
    path: Path, parts: list[Part], describe: Callable[[Path], dict[str, Any]], *, overwrite: bool
) -> Path:
    """Make the directory ``path`` of ``parts`` and of what ``describe`` says once they are written; returns it.

    Tensors are written one after another, so this needs the memory of the largest of them. Raises `UsageError` for an
    existing output.
    """
    if path.exists() and not overwrite:
        raise UsageError(
            f"the output '{path}' exists", "Choose another, or pass overwrite (--overwrite) to replace it"
        )
    if path.exists() and not is_context(path):
        raise UsageError(
            f"the output '{path}' is no fitted context", "It will not be replaced: choose another"
        )
    work = path.with_name(f".{path.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        write_safetensors(work / CONTEXT_TENSORS, parts)
        facts = describe(work / CONTEXT_TENSORS)
        (work / CONTEXT_JSON).write_text(_lines(facts), encoding="utf-8")
        if path.exists():
            old = path.with_name(f".{path.name}.replaced")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            work.rename(path)
            shutil.rmtree(old)
        else:
            work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return path


def _lines(facts: dict[str, Any]) -> str:
    """JSON with a line for each key: short, and still read by eye."""
    rows = (
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
        for key, value in facts.items()
    )
    return "{\n" + ",\n".join(rows) + "\n}\n"


def finished(facts: dict[str, Any], tensors: Path) -> dict[str, Any]:
    """``facts`` with what every context.json holds: format, the tensors' hash, versions and its own digest."""
    whole = {"format": "loadstone-context", "format_version": FORMAT_VERSIONS[facts["kind"]]} | facts
    whole["files"] = {CONTEXT_TENSORS: {"sha256": sha256_file(tensors), "bytes": tensors.stat().st_size}}
    whole["versions"] = {"loadstone": __version__}
    return whole | {"digest": digest(whole)}


def write_safetensors(path: Path, parts: list[Part]) -> None:
    """Write ``parts``, of any device, to ``path`` and sync it to disk; one of them at a time is on the CPU."""
    with path.open("wb") as file:
        # The header comes first and is known last: room is left for its longest form.
        room = len(_header(parts, [part.nbytes for part in parts]))
        room += -room % 8
        file.write(struct.pack("<Q", room) + b" " * room)
        written = []
        for part in parts:
            begin = file.tell()
            for chunk in part.chunks():
                file.write(chunk)
            written.append(file.tell() - begin)
        header = _header(parts, written)
        file.seek(8)
        file.write(header + b" " * (room - len(header)))
        file.flush()
        os.fsync(file.fileno())


def _header(parts: list[Part], sizes: list[int]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for part, size in zip(parts, sizes, strict=True):
        end = position + size
        shape = list(part.shape) if size == part.nbytes else [size]
        header[part.name] = {"dtype": part.dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return json.dumps(header, separators=(",", ":")).encode()

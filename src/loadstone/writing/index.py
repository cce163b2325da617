"""How tensors are divided among files, and the index that says which file holds which."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from loadstone.artifact.formats.weights import SAFETENSORS, SAFETENSORS_INDEX

# Bytes of weights in a file, where nothing else is asked for: each file is hashed by one thread, about 1 GB a second.
SHARD_BYTES = 2 * 10**9


class Sized(Protocol):
    """Anything that knows its bytes in the file."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


def in_shards(items: Iterable[T], max_bytes: int) -> tuple[tuple[T, ...], ...]:
    """``items`` in their order, divided greedily: a file closes when the next item would overfill it."""
    shards: list[list[T]] = [[]]
    size = 0
    for item in items:
        nbytes = item.nbytes
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += nbytes
    return tuple(tuple(shard) for shard in shards)


def shard_name(number: int, count: int) -> str:
    """transformers' name of file ``number``, counted from 0, of ``count``."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def weights_name(number: int, count: int) -> str:
    """The same for an artifact whose single file needs no index: ``model.safetensors``."""
    return SAFETENSORS if count == 1 else shard_name(number, count)


def write_index(folder: Path, files: dict[str, str], total_size: int) -> None:
    """Write ``model.safetensors.index.json``: tensor name -> file, and the bytes of all tensors."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

"""A description and its tensors packed into one safetensors file: what TabPFN contexts are stored as.

Large tensors lie under their names as bytes (`packing`); the last one, `DESCRIPTION`, holds the JSON of the rest and
all small tensors in one stream. Reading unpacks in threads, so that whoever loads can make a model meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from loadstone.artifact.context_errors import CorruptContext
from loadstone.artifact.context_file import CONTEXT_TENSORS, ContextFile, check_content
from loadstone.artifact.files import MAX_JSON_BYTES, too_many_items
from loadstone.context.tabpfn.packing import (
    LARGE,
    WORKERS,
    Packing,
    deflate,
    gather,
    inflate,
    pack,
    scatter,
    unpack,
)
from loadstone.quantization.flatten import dtype_name
from loadstone.writing.shards import Part

DESCRIPTION = "description"
# More than any file: only the room that its digits take matters.
_UNKNOWN = 10**13
_RESAVE = "Save it again"


def packed_parts(
    pool: ThreadPoolExecutor, description: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[list[Part], Callable[[], dict[str, int]]]:
    """What to write for a description and its tensors, and a function that says what was written (for context.json's
    ``packed``): bytes of the JSON, of the small tensors, and of all tensors unpacked."""
    large = {name: tensors[name] for name in sorted(tensors) if tensors[name].nbytes >= LARGE}
    small = {name: tensors[name] for name in sorted(tensors) if name not in large}
    packings: dict[str, Packing] = {}
    sizes: dict[str, int] = {"tensors": sum(t.nbytes for t in tensors.values())}

    def one(name: str) -> list[Any]:
        packings[name], chunks = pack(pool, large[name])
        return chunks

    def rest() -> list[bytes]:
        index = {
            "packed": {name: how.to_json() for name, how in packings.items()},
            "small": {name: [dtype_name(t.dtype), list(t.shape)] for name, t in small.items()},
        }
        text = json.dumps(description | index, separators=(",", ":")).encode()
        loose = gather(small)
        sizes.update(description=len(text), small=len(loose))
        return [deflate(text + loose)]

    parts = [Part(name, "U8", (t.nbytes,), t.nbytes, lambda n=name: one(n)) for name, t in large.items()]  # type: ignore[misc]
    return [*parts, Part(DESCRIPTION, "U8", (_UNKNOWN,), _UNKNOWN, rest)], lambda: sizes


def packed_bytes(description: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """Bytes that these take packed, the file's header aside; everything is packed for that, one after another."""
    with ThreadPoolExecutor(WORKERS) as pool:
        parts, _ = packed_parts(pool, description, tensors)
        return sum(len(chunk) for part in parts for chunk in part.chunks())


class PackedFile:
    """A packed context, opened: its ``description``, and its tensors, on the CPU, which threads unpack meanwhile.

    The hash of the file is taken meanwhile too: what is made of it must wait for `finish`. Close it in any case.
    """

    def __init__(self, file: ContextFile) -> None:
        self._file = file
        self._descriptor = os.open(file.path / CONTEXT_TENSORS, os.O_RDONLY)
        self._pool = ThreadPoolExecutor(WORKERS)
        self._content = self._pool.submit(check_content, file)
        try:
            self.description, self._ready = self._open()
        except CorruptContext:
            self._explain()
            raise
        except Exception as error:
            self._explain()
            reason = " ".join(str(error).split())[:200]
            raise CorruptContext(
                f"{CONTEXT_TENSORS}: its description is malformed ({reason})", _RESAVE
            ) from None

    def take(self, name: str) -> Tensor:
        """A tensor by name, once, whole; raises `CorruptContext` for damage, an unknown name and for a second time."""
        if name not in self._ready:
            raise CorruptContext(f"{CONTEXT_TENSORS}: tensor '{name}' is missing or used twice", _RESAVE)
        tensor, waiting = self._ready.pop(name)
        for future in waiting:
            future.result()
        return tensor

    def finish(self) -> None:
        """Raises `CorruptContext` unless the file is what was written."""
        self._content.result()

    def check_all_taken(self) -> None:
        """Raises `CorruptContext` for a tensor that nothing asked for."""
        if self._ready:
            raise CorruptContext(f"{CONTEXT_TENSORS}: tensor '{min(self._ready)}' does not belong", _RESAVE)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def _explain(self) -> None:
        """Damage shows in many ways: a hash that differs says it best. Closes the file."""
        try:
            self._content.result()
        finally:
            self.close()

    def _open(self) -> tuple[dict[str, Any], dict[str, tuple[Tensor, list[Future[None]]]]]:
        file, claimed = self._file, self._file.facts.get("packed")
        if DESCRIPTION not in file.tensors or not isinstance(claimed, dict):
            raise CorruptContext(f"{CONTEXT_TENSORS}: tensor '{DESCRIPTION}' is missing", _RESAVE)
        text_bytes, loose_bytes = claimed.get("description"), claimed.get("small")
        if type(text_bytes) is not int or type(loose_bytes) is not int or min(text_bytes, loose_bytes) < 0:
            raise CorruptContext("context.json: 'packed' is malformed", _RESAVE)
        if not 0 < text_bytes + loose_bytes <= MAX_JSON_BYTES:
            raise CorruptContext(
                f"the description claims {text_bytes + loose_bytes} bytes, over the limit of {MAX_JSON_BYTES}",
                "Do not trust it",
            )
        info = file.tensors[DESCRIPTION]
        whole = inflate(DESCRIPTION, self._read(info.begin, info.nbytes), text_bytes + loose_bytes)
        text = whole[:text_bytes]
        if too_many_items(text):
            raise CorruptContext("the description holds too many items", "Do not trust it")
        description = json.loads(text)
        loose = scatter(description.pop("small"), memoryview(whole)[text_bytes:])
        ready: dict[str, tuple[Tensor, list[Future[None]]]] = {name: (tensor, []) for name, tensor in loose}
        packings = description.pop("packed")
        if not packings.keys() == file.tensors.keys() - {DESCRIPTION} or ready.keys() & packings.keys():
            raise CorruptContext(f"{CONTEXT_TENSORS}: its tensors are not the described ones", _RESAVE)
        for name, entry in packings.items():
            ready[name] = self._unpack(name, Packing.from_json(name, entry))
        return description, ready

    def _unpack(self, name: str, how: Packing) -> tuple[Tensor, list[Future[None]]]:
        info = self._file.tensors[name]
        if info.dtype != "U8" or info.nbytes != sum(how.sizes):
            raise CorruptContext(
                f"tensor '{name}' has {info.nbytes} bytes, its packing {sum(how.sizes)}", _RESAVE
            )
        return unpack(self._pool, name, how, lambda begin, size: self._read(info.begin + begin, size))

    def _read(self, begin: int, size: int) -> bytes:
        found = os.pread(self._descriptor, size, begin)
        if len(found) != size:
            raise CorruptContext(f"{CONTEXT_TENSORS} was cut short while it was read", _RESAVE)
        return found

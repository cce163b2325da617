"""A TabPFN estimator's tensors on disk: its own under their paths, and the JSON tree of all else as UTF-8 bytes."""

from __future__ import annotations

import json
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loadstone.artifact.context_errors import CorruptContext
from loadstone.artifact.context_file import CONTEXT_TENSORS, ContextFile
from loadstone.artifact.files import MAX_JSON_BYTES, too_many_items
from loadstone.artifact.formats.safetensors import open_tensors
from loadstone.errors import UsageError

# Name of the tensor (uint8) that holds the tree.
TREE = "estimator.json"
_RESAVE = "Save it again"


def stored_tensors(tree: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the file. Raises `UsageError` for a tree that `StoredEstimator` would refuse to read."""
    text = json.dumps(tree, separators=(",", ":")).encode()
    if len(text) > MAX_JSON_BYTES or too_many_items(text):
        raise UsageError(
            f"the estimator without its tensors is {len(text):,} bytes of JSON, too many for a context",
            "Give text columns fewer distinct values, or keep this estimator with the package's own save",
        )
    return tensors | {TREE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


class StoredEstimator:
    """The tensors of an opened context: ``tree`` is the JSON tree, `take` gives each tensor once, on the CPU.

    Use it as a context manager. Raises `CorruptContext` for a tree that cannot be read.
    """

    def __init__(self, file: ContextFile) -> None:
        self._opened = ExitStack()
        self._file: Any = self._opened.enter_context(open_tensors(file.path / CONTEXT_TENSORS))
        self._left = set(file.tensors)
        info = file.tensors.get(TREE)
        if info is None or info.dtype != "U8" or info.nbytes > MAX_JSON_BYTES:
            raise CorruptContext(f"{CONTEXT_TENSORS}: tensor '{TREE}' is missing or malformed", _RESAVE)
        text = self.take(TREE).numpy().tobytes()
        if too_many_items(text):
            raise CorruptContext(f"{CONTEXT_TENSORS}: '{TREE}' holds too many items", "Do not trust it")
        try:
            self.tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorruptContext(f"{CONTEXT_TENSORS}: '{TREE}' is not JSON ({error})", _RESAVE) from None
        if not isinstance(self.tree, dict):
            raise CorruptContext(f"{CONTEXT_TENSORS}: '{TREE}' is not a JSON object", _RESAVE)

    def __enter__(self) -> StoredEstimator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def take(self, name: str) -> Tensor:
        """A copy of a tensor; raises `CorruptContext` for an unknown name and for a second time."""
        if name not in self._left:
            raise CorruptContext(f"{CONTEXT_TENSORS}: tensor '{name}' is missing or used twice", _RESAVE)
        self._left.remove(name)
        # A mapped tensor would change with the file under it.
        found: Tensor = self._file.get_tensor(name).clone()
        return found

    def check_all_taken(self) -> None:
        """Raise `CorruptContext` for a tensor that is not part of the estimator."""
        if self._left:
            raise CorruptContext(f"{CONTEXT_TENSORS}: tensor '{min(self._left)}' does not belong", _RESAVE)

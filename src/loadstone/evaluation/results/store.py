"""Finished and partial scores on disk, keyed by content: weights, text, protocol and code, never paths."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.errors import UsageError
from loadstone.text.arrays import Arrays, read_arrays, write_arrays
from loadstone.text.tokens import Protocol

log = logging.getLogger(__name__)

# Raise when a change to scoring changes a number: older entries are then no longer found.
SCORING_VERSION = 3


@dataclass(frozen=True)
class Store:
    """A directory of scores. Entries are written whole (temporary file, then rename), so it may be shared."""

    directory: Path

    def finished(self, key: str) -> tuple[Arrays, dict[str, Any]] | None:
        """Values and facts of a finished evaluation, or None."""
        return read_arrays(self._path(key, "scores"))

    def finish(self, key: str, values: Arrays, facts: dict[str, Any]) -> None:
        """Store a finished evaluation, and remove its partial scores."""
        self._write(self._path(key, "scores"), values, facts)
        for partial in self._partials(key):
            partial.unlink(missing_ok=True)

    def partial(self, key: str) -> Arrays | None:
        """The scores of interrupted runs, of any number of processes, merged; None if there are none."""
        found = map(read_arrays, self._partials(key))
        return merge_partials([values for values, _ in filter(None, found)])

    def save_partial(self, key: str, rank: int, values: Arrays) -> None:
        """Store the scores that one process has so far."""
        self._write(self._path(key, f"partial{rank}"), values, {})

    def _write(self, path: Path, values: Arrays, facts: dict[str, Any]) -> None:
        try:
            write_arrays(path, values, facts)
        except OSError as error:
            # The scores are there: they are worth more than their copy.
            log.warning("%s cannot be written (%s): scores are not stored", path, error.strerror)

    def _path(self, key: str, suffix: str) -> Path:
        return self.directory / key[:2] / f"{key}.{suffix}.npz"

    def _partials(self, key: str) -> list[Path]:
        return sorted((self.directory / key[:2]).glob(f"{key}.partial*.npz"))


def merge_partials(parts: Iterable[Arrays | None]) -> Arrays | None:
    """Merge partial scores: every token that one of them has; None when there are none."""
    merged: Arrays | None = None
    for values in parts:
        if merged is None or values is None:
            merged = merged if values is None else values
        else:
            merged = {k: np.where(np.isnan(v), values[k], v) for k, v in merged.items()}
    return merged


def open_store(directory: str) -> Store:
    """Use a directory as a store, made if absent. Raises UsageError when that is not possible."""
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UsageError(f"--cache '{directory}': {error.strerror}") from None
    return Store(path)


def entry_key(protocol: Protocol, fingerprints: Sequence[str], mode: dict[str, Any]) -> str:
    """The key of an evaluation: weights, tokens, windows and dtype, and the versions of what computed it."""
    import torch
    import transformers

    from loadstone._version import __version__

    facts = asdict(protocol)
    # Names of the text and the tokenizer do not matter: the hash of the tokens does.
    for name in ("data", "tokenizer_sha256"):
        del facts[name]
    # It is in ``mode``.
    del facts["compiled"]
    if not protocol.prefix_tokens:
        # Scores of runs without a prefix keep the keys they had before prefixes.
        del facts["prefix_tokens"], facts["prefix_sha256"]
    facts |= {
        "fingerprints": list(fingerprints),
        "mode": mode,
        "scoring": SCORING_VERSION,
        "loadstone": __version__,
    }
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

"""Finished and half-finished scores on disk, found again by content: weights, text, protocol and code,
never paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.errors import UsageError
from loadstone.evaluation.scoring.losses import Values
from loadstone.text.arrays import read_arrays, write_arrays
from loadstone.text.tokens import Protocol

# Raise when a change to scoring changes a number: older entries are then no longer found.
SCORING_VERSION = 2


@dataclass(frozen=True)
class Store:
    """A directory of scores. Entries are written whole (temporary file, then rename), so it may be shared."""

    directory: Path

    def finished(self, key: str) -> tuple[Values, dict[str, Any]] | None:
        """Values and facts of a finished evaluation, or None."""
        return read_arrays(self._path(key, "scores"))

    def finish(self, key: str, values: Values, facts: dict[str, Any]) -> None:
        """Keep a finished evaluation, and drop what was kept of it half done."""
        write_arrays(self._path(key, "scores"), values, facts)
        for partial in self._partials(key):
            partial.unlink(missing_ok=True)

    def partial(self, key: str) -> Values | None:
        """What earlier runs, of any number of processes, got done before they stopped; None if nothing."""
        found = map(read_arrays, self._partials(key))
        return merge_partials([values for values, _ in filter(None, found)])

    def save_partial(self, key: str, rank: int, values: Values) -> None:
        """Keep what one process got done so far."""
        write_arrays(self._path(key, f"partial{rank}"), values, {})

    def _path(self, key: str, suffix: str) -> Path:
        return self.directory / key[:2] / f"{key}.{suffix}.npz"

    def _partials(self, key: str) -> list[Path]:
        return sorted((self.directory / key[:2]).glob(f"{key}.partial*.npz"))


def merge_partials(parts: Iterable[Values | None]) -> Values | None:
    """Half-done evaluations put together: every token that one of them has; None when there are none."""
    merged: Values | None = None
    for values in parts:
        if merged is None or values is None:
            merged = merged if values is None else values
        else:
            merged = {k: np.where(np.isnan(v), values[k], v) for k, v in merged.items()}
    return merged


def open_store(directory: str) -> Store:
    """Use a directory as a store. Raises UsageError when it cannot be one."""
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--cache {directory}: {error.strerror}") from None
    return Store(path)


def entry_key(protocol: Protocol, fingerprints: Sequence[str], mode: dict[str, Any]) -> str:
    """The key of an evaluation: what was computed (weights, tokens, windows, dtype), and with what."""
    import torch
    import transformers

    from loadstone._version import __version__

    facts = asdict(protocol)
    # The name of the text and of its tokenizer do not matter, what they come to does.
    for name in ("data", "tokenizer_sha256"):
        del facts[name]
    if not protocol.prefix_tokens:
        # Scores of runs without a prefix keep the keys they have.
        del facts["prefix_tokens"], facts["prefix_sha256"]
    facts |= {
        "fingerprints": list(fingerprints),
        "mode": mode,
        "scoring": SCORING_VERSION,
        "loadstone": __version__,
    }
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

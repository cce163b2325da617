"""A result written by an earlier run with ``--json``, used as the baseline without loading its model again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.errors import UsageError
from loadstone.text.tokens import Protocol


@dataclass(frozen=True, eq=False)
class Saved:
    """One model of a saved result. ``sums``: its loss sums per resampled unit, float64 (units,)."""

    protocol: Protocol
    record: dict[str, Any]
    sums: np.ndarray


def read_saved(path: str) -> Saved:
    """The reference of a saved result, or its only model. Raises UsageError for any other file."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        protocol = Protocol(**result["protocol"])
        records = result["models"]
        chosen = next((r for r in records if r["reference"]), records[0])
        sums = np.array(chosen["unit_losses"], dtype=np.float64)
        chosen["path"], chosen["loss"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"'{path}' is not a result of this version of `loadstone eval --json` ({type(error).__name__}: {reason})",
            "Name a model directory, or write the result again",
        ) from None
    return Saved(protocol, {**chosen, "reference": True, "cached": True}, sums)

"""A result written by an earlier run with ``--json``, used as the baseline without loading its model again."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.artifact.files import read_json
from loadstone.errors import LoadstoneError, UsageError
from loadstone.evaluation.results.tables import tables
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
        result = read_json(Path(path))
        protocol = Protocol(**result["protocol"])
        _check_types(protocol)
        records = result["models"]
        chosen = next((r for r in records if r["reference"]), records[0])
        sums = np.array(chosen["unit_losses"], dtype=np.float64)
        if sums.ndim != 1 or not len(sums) or not np.isfinite(sums).all():
            raise ValueError("unit_losses is not a list of finite numbers")
        if not isinstance(chosen["path"], str):
            raise TypeError("path is no text")
        if not isinstance(chosen["loss"], float) or not math.isfinite(chosen["loss"]):
            raise TypeError("loss is no finite number")
        if not math.isclose(sums.sum() / protocol.tokens, chosen["loss"], rel_tol=1e-4, abs_tol=1e-6):
            raise ValueError("its loss is not that of its unit_losses")
        # Now and not after the work: whatever of it cannot be shown.
        tables([chosen], report=True)
    except LoadstoneError as error:
        raise UsageError(
            f"'{path}' is not a result of `loadstone eval --json` ({error.message})",
            "Name a model directory, or write the result again",
        ) from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
        ZeroDivisionError,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"'{path}' is not a result of this version of `loadstone eval --json` ({type(error).__name__}: {reason})",
            "Name a model directory, or write the result again",
        ) from None
    return Saved(protocol, {**chosen, "reference": True, "cached": True}, sums)


def _check_types(protocol: Protocol) -> None:
    for item in fields(protocol):
        value = getattr(protocol, item.name)
        # Annotations are their text: `str`, `int` or `bool`.
        if type(value).__name__ != item.type:
            raise TypeError(f"{item.name} is a {type(value).__name__}, not a {item.type}")

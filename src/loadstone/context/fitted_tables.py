"""Predictions and metrics of contexts fitted on tables, whichever model read the rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.context_file import TABLE_KINDS, TABPFN, context_kind, read_context, require_kind
from loadstone.context.opening import load_context
from loadstone.errors import UsageError

if TYPE_CHECKING:
    from loadstone.context.tables.predictions import Predictions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedTable:
    """A loaded context that was fitted on a table. ``source``: where its base was loaded from. ``predict(path,
    quantiles=..., measure=...)`` returns `Predictions`."""

    task: str
    rows: int
    target: str
    source: str
    predict: Callable[..., Predictions]


def open_table(path: str | Path, base: str | Path | None = None, *, device: str = "auto") -> FittedTable:
    """Load a context fitted on a table, with its base. Raises what `load_context` raises, and `KindMismatch` for a
    language-model prefix."""
    path = Path(path)
    require_kind(path, *TABLE_KINDS, by="predict")
    context: Any = load_context(path, base=base, device=device)
    if context_kind(path) == TABPFN:
        from loadstone.context.tabpfn.table import predict_table as predict_tabpfn

        facts = read_context(path).facts
        found = FittedTable(
            facts["task"],
            facts["rows"],
            str(facts["schema"].get("target", "?")),
            str(context.model_path),
            partial(predict_tabpfn, context, facts),
        )
    else:
        from loadstone.context.pfn.fit import predict_table

        found = FittedTable(
            context.task,
            context.rows,
            context.schema["target"] if context.schema else "?",
            str(context.model.source),
            partial(predict_table, context),
        )
    log.info("%s: fitted context (%s, %d rows); base: %s", path, found.task, found.rows, found.source)
    return found


def measure_table(
    path: str | Path, data: str | Path, base: str | Path | None = None, *, device: str = "auto"
) -> dict[str, Any]:
    """Metrics of a fitted context on a table with the true values, as plain JSON values; times in seconds.

    Raises `UsageError` for a table without the target column.
    """
    started = time.monotonic()
    context = open_table(path, base, device=device)
    loaded = time.monotonic()
    predictions = context.predict(data)
    if predictions.targets is None:
        raise UsageError(
            f"'{data}' has no column '{context.target}'",
            "Evaluation needs the true values: use predict without",
        )
    return {
        "path": str(path),
        "kind": "context",
        "task": context.task,
        "base": context.source,
        "training_rows": context.rows,
        "rows": len(predictions.targets),
        "metrics": predictions.metrics,
        "load_seconds": round(loaded - started, 3),
        "seconds": round(time.monotonic() - loaded, 3),
    }

"""Predictions for the rows of a table, and their metrics where the table has the target column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.context.tables import table as tables
from loadstone.context.tables.metrics import classification_metrics, regression_metrics
from loadstone.errors import ArtifactError, UsageError

REGRESSION, CLASSIFICATION = "regression", "classification"
TASKS = (REGRESSION, CLASSIFICATION)
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Predictions:
    """Predictions for a table's rows, of a regression or classification ``task``.

    ``columns`` are what `loadstone predict` writes, each (rows,): ``prediction`` and ``p(CLASS)`` for each class, or
    ``mean``, ``std`` and ``qQ`` for each quantile. ``targets`` (rows,) are the true values where the table has them and
    they were asked for, else None; ``metrics`` are computed from the two.
    """

    task: str
    columns: dict[str, np.ndarray]
    targets: np.ndarray | None
    metrics: dict[str, float | None]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))


def read_queries(
    path: str | Path, schema: dict[str, Any], *, measure: bool
) -> tuple[tables.Table, tables.Schema, bool]:
    """The table, the schema of the context it is given to, and whether its target column is to be read.

    Raises `UsageError` for a context that was not fitted on a table.
    """
    if "columns" not in schema:
        raise UsageError(
            "the context was not fitted on a table, so its columns have no names",
            "Use loadstone.load_context in Python",
        )
    known = tables.Schema.from_json(schema)
    table = tables.read_table(path)
    if not table.rows:
        raise ArtifactError(f"'{path}' has a header and no rows", "Add the rows to predict")
    return table, known, measure and known.target in table.columns


def classified(
    probabilities: np.ndarray, labels: list[str], table: tables.Table, target: str, *, measure: bool
) -> Predictions:
    """Predictions from class probabilities (rows, classes) in the order of ``labels``."""
    columns = {"prediction": np.array(labels, dtype=object)[probabilities.argmax(1)]}
    columns |= {f"p({label})": probabilities[:, i] for i, label in enumerate(labels)}
    if not measure:
        return Predictions(CLASSIFICATION, columns, None, {})
    targets = tables.class_targets(table, target, labels)[0]
    return Predictions(CLASSIFICATION, columns, targets, classification_metrics(probabilities, targets))


def regressed(
    columns: dict[str, np.ndarray],
    measured: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Predictions:
    """Predictions of a number. ``measured``: the true values, and the log density (nats) and distribution function of
    the prediction at them; each (rows,)."""
    if measured is None:
        return Predictions(REGRESSION, columns, None, {})
    targets, log_prob, cdf = measured
    metrics = regression_metrics(columns["mean"], log_prob, cdf, targets)
    return Predictions(REGRESSION, columns, targets, metrics)

"""`eval` of contexts fitted on tables: gates and rendering."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadstone.artifact.context_file import TABLE_KINDS, require_kind
from loadstone.cli import render
from loadstone.errors import GateFailed, UsageError

_METRICS = ("accuracy", "log_loss", "auc", "r2", "rmse", "mae", "nll", "calibration_error")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip


def evaluate(
    models: list[str], *, data: str, base: str | None, device: str, fail_if: list[str], json_to: str | None
) -> None:
    """``eval`` of one or more fitted contexts on a table that has their target column."""
    from loadstone.context.fitted_tables import measure_table

    for model in models:
        # The other models of the command are fitted tables.
        require_kind(Path(model), *TABLE_KINDS, by="a comparison with tables")
    gates = [_parse_gate(text) for text in fail_if]
    if data == "sample":
        raise UsageError(
            "a fitted context is evaluated on a table", "Add --data test.csv, with the target's column"
        )
    if json_to not in (None, "-"):
        render.check_file("--json", Path(str(json_to)))
    records = [measure_table(model, data, base, device=device) for model in models]
    verdicts = [
        {"gate": text, "model": record["path"], "value": record["metrics"][name], "failed": failed}
        for text, name, compare, limit in gates
        for record in records
        if (failed := _failed(record, name, compare, limit)) is not None
    ]
    outcome = {"protocol": {"data": data, "rows": records[0]["rows"]}, "models": records, "gates": verdicts}
    render.result(json_to, outcome, lambda: _show_metrics(records, data))
    failures = [f"{v['model']}: {v['gate']} failed (it is {v['value']:.6g})" for v in verdicts if v["failed"]]
    if failures:
        raise GateFailed("; ".join(failures))


def _parse_gate(text: str) -> tuple[str, str, str, float]:
    match = re.fullmatch(r"\s*([a-z_0-9]+)\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:e[-+]?\d+)?)\s*", text)
    if match is None or match[1] not in _METRICS:
        raise UsageError(
            f"--fail-if {text!r} is not a gate for a context",
            f"METRIC > NUMBER (or >=, <, <=), METRIC one of {', '.join(_METRICS)}; example: 'accuracy<0.9'",
        )
    try:
        return text, match[1], match[2], float(match[3])
    except ValueError:
        raise UsageError(f"--fail-if {text!r}: {match[3]} is no number", "Example: 'accuracy<0.9'") from None


def _failed(record: dict[str, Any], name: str, compare: str, limit: float) -> bool:
    value = record["metrics"].get(name)
    if value is None:
        raise UsageError(
            f"--fail-if {name}: {record['path']} is a {record['task']} context, which has no such figure here",
            f"It has {', '.join(record['metrics'])}",
        )
    return _COMPARE[compare](value, limit)


def _show_metrics(records: list[dict[str, Any]], data: str) -> None:
    names = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    rows = [
        [record["path"], str(record["training_rows"])]
        + ["-" if (value := record["metrics"].get(name)) is None else f"{value:.4f}" for name in names]
        for record in records
    ]
    title = f"{data}: {records[0]['rows']} rows"
    right = tuple(range(1, len(names) + 2))
    render.console().print(render.table(title, ["context", "fitted on", *names], rows, right=right))

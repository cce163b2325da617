"""Records as tables of text, for the terminal and the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadstone.evaluation.results.metrics import (
    COST,
    DELTA,
    DIVERGENCE,
    LOSS,
    SPEED,
    TABLE_GROUPS,
    Metric,
    columns,
)
from loadstone.text.tokens import Protocol

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Rows of text under column names. ``left``: how many columns hold words; the others hold numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: int = 1


def tables(records: Records, *, names: Sequence[str] | None = None, report: bool = False) -> list[Table]:
    """Every table that the records have metrics for. ``names``: of the models, instead of their paths; ``report``: with
    the columns of the HTML report."""
    shown = [{**r, "path": n} for r, n in zip(records, names or [r["path"] for r in records], strict=True)]
    if any("metrics" in record for record in shown):
        return [_fitted_tables(shown)]
    wanted = [_losses(shown, report)]
    for key, make in (("kl", _divergences), ("tasks", _tasks), ("speed", _speeds)):
        if any(record.get(key) for record in shown):
            wanted.append(make(shown))
    return wanted


def describe(protocol: Protocol) -> str:
    """One line on the text and how it is divided into windows."""
    start = "every document and window" if protocol.bos_each_window else "every document"
    if protocol.prefix_tokens:
        start = f"a prefix of {protocol.prefix_tokens} tokens comes before every document and window"
    else:
        start = f"{protocol.separator} starts {start}"
    chat = {
        "": "",
        "all": "conversations in the chat template; ",
        "completions": "answers alone are scored, in the chat template; ",
    }
    stride = f", stride {protocol.stride}" if protocol.name == "strided" else ""
    return (
        f"{protocol.documents} documents, {protocol.tokens} tokens of {protocol.data}; {chat[protocol.chat]}"
        f"{protocol.name} windows of {protocol.context_length}{stride}; {start}; {protocol.dtype}"
        f"{', compiled layers' if protocol.compiled else ''}"
    )


def _losses(records: Records, report: bool) -> Table:
    compared = any(r["delta_loss"] is not None for r in records)
    deltas = columns(DELTA) if compared else []
    metrics = [*columns(LOSS), *deltas, *columns(COST, report=report)]
    return Table(
        "Loss", _headings(["model"], metrics), [[r["path"], *_loss_cells(r, metrics)] for r in records]
    )


def _loss_cells(record: dict[str, Any], metrics: list[Metric]) -> list[str]:
    # The reference's row says so once: its other differences stay empty.
    skip = {m.key for m in columns(DELTA)[1:]} if record["delta_loss"] is None else set()
    return ["" if m.key in skip else m.cell(record) for m in metrics]


def _divergences(records: Records) -> Table:
    metrics = columns(DIVERGENCE)
    rows = [[r["path"], *(m.cell(r) for m in metrics)] for r in records if "kl" in r]
    return Table("Divergence from the reference", _headings(["model"], metrics), rows)


def _tasks(records: Records) -> Table:
    value = Metric("value", (), "", stderr=True)
    delta = Metric("delta", (), "", form="+.4f", stderr=True)
    p_value = Metric("p_value", (), "", form=".3f")
    rows = [
        [r["path"], t["task"], t["metric"], *(m.cell(t) for m in (value, delta, p_value))]
        for r in records
        for t in ({**task, "value_stderr": task["stderr"]} for task in r.get("tasks", ()))
    ]
    return Table("Tasks", ["model", "task", "metric", "value", "paired Δ", "p"], rows, left=3)


def _speeds(records: Records) -> Table:
    metrics = columns(SPEED)
    # Peak memory last: it is a cost, not a speed.
    metrics.sort(key=lambda m: COST in m.groups)
    rows = [
        [
            r["path"],
            f"{s['batch_size']}{', compiled' if s['compiled'] else ''}",
            *(m.cell(s) for m in metrics),
        ]
        for r in records
        for s in r.get("speed", ())
    ]
    return Table("Speed", _headings(["model", "batch"], metrics), rows)


def _fitted_tables(records: Records) -> Table:
    measured = {key for record in records for key in record["metrics"]}
    metrics = [m for m in columns(*TABLE_GROUPS) if m.key in measured]
    rows = [
        [r["path"], str(r["training_rows"]), *(m.cell(r["metrics"]) or m.missing for m in metrics)]
        for r in records
    ]
    return Table("Predictions", _headings(["context", "fitted on"], metrics), rows)


def _headings(first: list[str], metrics: list[Metric]) -> list[str]:
    return first + [m.heading for m in metrics]

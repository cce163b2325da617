"""What finalize --fit and eval do for contexts fitted on tables: call and render. Parsing stays with each command."""

from __future__ import annotations

import logging
import operator
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.builtin import PREFIX
from loadstone.artifact.context_file import TABLE_KINDS, TABPFN, context_kind, require_kind
from loadstone.cli import render
from loadstone.cli.context_facts import closing, unpacked_bytes, written
from loadstone.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from loadstone.context.pfn.fit import FitPlan, Predictions
    from loadstone.context.tabpfn.table import TabpfnPlan

DEFAULT_BASE = f"{PREFIX}tiny-pfn"
log = logging.getLogger("loadstone")

_METRICS = ("accuracy", "log_loss", "auc", "r2", "rmse", "mae", "nll", "calibration_error")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip


@dataclass(frozen=True)
class FitRequest:
    """The options of ``finalize --fit``, as they stand on the line."""

    base: str
    out: Path | None
    data: Path
    target: str | None
    task: str | None
    cache_dtype: str | None
    device: str
    overwrite: bool
    dry_run: bool
    as_json: bool


def fit(request: FitRequest) -> None:
    """``finalize --fit``: plan, and unless it is a dry run fit and save."""
    if request.target is None:
        raise UsageError("--fit needs --target NAME, the column to predict", "Name a column of the table")
    if request.out is not None and request.out.exists() and not request.overwrite and not request.dry_run:
        raise UsageError(
            f"the output '{request.out}' exists", "Choose another, or pass --overwrite to replace it"
        )
    from loadstone.context.tabpfn.table import is_checkpoint

    if is_checkpoint(request.base):
        return _fit_tabpfn(request)
    from loadstone.artifact import detect
    from loadstone.artifact.detect import PFN

    artifact = detect(request.base)
    if artifact.kind != PFN:
        raise UsageError(
            f"'{request.base}' is {artifact.kind}, and --fit needs an in-context model",
            f"Try -M {DEFAULT_BASE}",
        )
    from loadstone.context.pfn.fit import fit_table, plan_fit

    plan = plan_fit(
        artifact, request.data, request.target, task=request.task, cache_dtype=request.cache_dtype
    )
    summary = _summary(plan, request)
    if request.dry_run:
        _show_fit(summary, request.as_json)
        return
    assert request.out is not None
    started = time.monotonic()
    context = fit_table(plan, source=request.base, device=request.device)
    context.save(request.out, overwrite=request.overwrite)
    _show_fit(summary | {"bytes": context.nbytes} | written(request.out, started), request.as_json)


def _fit_tabpfn(request: FitRequest) -> None:
    from loadstone.context.tabpfn import table as tabpfn_table

    assert request.target is not None
    plan = tabpfn_table.plan_fit(
        request.base, request.data, request.target, task=request.task, cache_dtype=request.cache_dtype
    )
    summary = _common(plan, request) | {
        "architecture": plan.architecture,
        "cache_dtype": request.cache_dtype or "the checkpoint's default",
        "cache_bytes": plan.cache_bytes,
        "predicted_bytes": plan.cache_bytes,
    }
    if request.dry_run:
        _show_fit(summary, request.as_json)
        return
    assert request.out is not None
    started = time.monotonic()
    estimator = tabpfn_table.fit_table(plan, device=request.device)
    tabpfn_table.save_table(plan, estimator, request.out, overwrite=request.overwrite)
    from loadstone.artifact.context_file import read_context

    file = read_context(request.out)
    summary |= {
        "members": file.facts["cache"]["members"],
        "cache_dtype": file.facts["cache"]["dtype"],
        "cache_bytes": file.cache_bytes,
        "bytes": unpacked_bytes(file),
    }
    _show_fit(summary | written(request.out, started), request.as_json)


def _common(plan: FitPlan | TabpfnPlan, request: FitRequest) -> dict[str, Any]:
    return {
        "dry_run": True,
        "out": str(request.out) if request.out else None,
        "base": request.base,
        "data": str(request.data),
        "target": plan.schema.target,
        "task": plan.task,
        "rows": plan.rows,
        "features": len(plan.schema.names),
        "categorical": sorted(plan.schema.categories),
        "classes": list(plan.classes),
    }


def _summary(plan: FitPlan, request: FitRequest) -> dict[str, Any]:
    return _common(plan, request) | {
        "cache_dtype": plan.cache_dtype,
        "cache_bytes": plan.cache_bytes,
        "predicted_bytes": plan.total_bytes,
    }


def _show_fit(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        render.print_json(summary)
        return
    kinds = f", {len(summary['categorical'])} of them categorical" if summary["categorical"] else ""
    classes = f" of {len(summary['classes'])} classes" if summary["classes"] else ""
    rows = [
        ["base", summary["base"]],
        ["task", f"{summary['task']} of '{summary['target']}'{classes}"],
        ["training rows", f"{summary['rows']:,}"],
        ["features", f"{summary['features']}{kinds}"],
    ]
    if summary["cache_bytes"] is not None:
        rows.append(["cache", f"{render.size(summary['cache_bytes'])} in {summary['cache_dtype']}"])
    if summary["dry_run"] and summary["predicted_bytes"] is not None:
        packed = ", less on disk: tensors are packed" if "architecture" in summary else ""
        rows.append(["context", f"{render.size(summary['predicted_bytes'])} predicted{packed}"])
    render.console().print(render.table("", ["", ""], rows), markup=False)
    render.console().print(closing(summary), markup=False)


def evaluate(
    models: list[str], *, data: str, base: str | None, device: str, fail_if: list[str], json_to: str | None
) -> None:
    """``eval`` of one or more fitted contexts on a table that has their target column."""
    for model in models:
        # The others of the line are fitted tables.
        require_kind(Path(model), *TABLE_KINDS, by="a comparison with tables")
    gates = [_parse_gate(text) for text in fail_if]
    if data == "sample":
        raise UsageError(
            "a fitted context is evaluated on a table", "Add --data test.csv, with the target's column"
        )
    if json_to not in (None, "-"):
        render.check_file("--json", Path(str(json_to)))
    records = [_record(model, data, base, device) for model in models]
    verdicts = [
        {"gate": text, "model": record["path"], "value": record["metrics"][name], "failed": failed}
        for text, name, compare, limit in gates
        for record in records
        if (failed := _failed(record, name, compare, limit)) is not None
    ]
    outcome = {"protocol": {"data": data, "rows": records[0]["rows"]}, "models": records, "gates": verdicts}
    if json_to == "-":
        render.print_json(outcome)
    else:
        if json_to is not None:
            render.write_file(Path(json_to), render.to_json(outcome))
        _show_metrics(records, data)
    failures = [f"{v['model']}: {v['gate']} failed (it is {v['value']:.6g})" for v in verdicts if v["failed"]]
    if failures:
        raise GateFailed("; ".join(failures))


@dataclass(frozen=True)
class TableContext:
    """A fitted table of either kind, loaded. ``predict(data, quantiles=…, measure=…)`` gives `fit.Predictions`."""

    task: str
    rows: int
    target: str
    source: str
    predict: Callable[..., Predictions]


def open_table(path: str, base: str | None, device: str) -> TableContext:
    """Load a PFN's or TabPFN's context with its base."""
    from functools import partial

    from loadstone.context import load_context

    context: Any = load_context(path, base=base, device=device)
    if context_kind(Path(path)) == TABPFN:
        from loadstone.artifact.context_file import read_context
        from loadstone.context.tabpfn import table as tabpfn_table

        facts = read_context(Path(path)).facts
        found = TableContext(
            facts["task"],
            facts["rows"],
            str(facts["schema"].get("target", "?")),
            str(context.model_path),
            partial(tabpfn_table.predict_table, context, facts),
        )
    else:
        from loadstone.context.pfn.fit import predict_table

        found = TableContext(
            context.task,
            context.rows,
            context.schema["target"] if context.schema else "?",
            str(context.model.source),
            partial(predict_table, context),
        )
    log.info("%s: fitted context (%s, %d rows); base: %s", path, found.task, found.rows, found.source)
    return found


def _record(path: str, data: str, base: str | None, device: str) -> dict[str, Any]:
    started = time.monotonic()
    context = open_table(path, base, device)
    loaded = time.monotonic()
    predictions = context.predict(data)
    if predictions.targets is None:
        raise UsageError(
            f"'{data}' has no column '{context.target}'",
            "Evaluation needs the true values: use predict without",
        )
    return {
        "path": path,
        "kind": "context",
        "task": context.task,
        "base": context.source,
        "training_rows": context.rows,
        "rows": len(predictions.targets),
        "metrics": predictions.metrics,
        "load_seconds": round(loaded - started, 3),
        "seconds": round(time.monotonic() - loaded, 3),
    }


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

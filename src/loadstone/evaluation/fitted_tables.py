"""Evaluate contexts fitted on tables: their predictions for a table that has the target's column."""

from __future__ import annotations

from pathlib import Path

from loadstone.artifact.context_file import TABLE_KINDS, read_context, require_kind
from loadstone.context.fitted_tables import measure_table
from loadstone.errors import UsageError
from loadstone.evaluation.options import DEFAULT_DATA, Options
from loadstone.evaluation.result import Evaluation
from loadstone.evaluation.results.gates import check_gates, judge


def evaluate_tables(options: Options) -> Evaluation:
    """Predict the rows of a table with each fitted context, and compare with the true values of the target's column.

    Raises UsageError for options that do not apply, and when the table lacks the target's column.
    """
    for model in options.models:
        require_kind(Path(model), *TABLE_KINDS, by="a comparison with tables")
    options.refuse_for_tables()
    if options.data == DEFAULT_DATA:
        raise UsageError(
            "a fitted context is evaluated on a table", "Add --data test.csv, with the target's column"
        )
    for model in options.models:
        task = read_context(Path(model)).facts["task"]
        check_gates(options.gates, (task,), f"'{model}', a {task} context,")
    records = tuple(
        measure_table(model, options.data, options.base, device=options.device) for model in options.models
    )
    verdicts = [judge(gate, r["path"], r["metrics"]) for gate in options.gates for r in records]
    rows = records[0]["rows"]
    return Evaluation(
        protocol={"data": options.data, "rows": rows},
        records=records,
        verdicts=tuple(verdicts),
        description=f"{options.data}: {rows} rows",
    )

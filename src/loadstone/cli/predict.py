"""`loadstone predict`: predictions of a fitted context for the rows of a table."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadstone.cli import options, render
from loadstone.errors import UsageError

if TYPE_CHECKING:
    from loadstone.context.tables.predictions import Predictions

log = logging.getLogger("loadstone")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("predict", no_args_is_help=True)(command)


def command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option("-M", "--model", metavar="DIR", help="Fitted context.", rich_help_panel=options.INPUT),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="Table: .csv, .tsv or .parquet.", rich_help_panel=options.INPUT
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE",
            help="File to write; otherwise stdout.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    base: options.Base = None,
    follow_links: options.FollowLinks = False,
    quantiles: Annotated[
        str | None,
        typer.Option(
            metavar="Q,Q",
            help="Quantiles of a regression (default 0.05,0.5,0.95).",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    json_to: options.Json = None,
) -> None:
    """Predict each row of a table with a fitted context.

    Classification gives the label and each class's probability, regression the mean, the standard deviation and
    quantiles. The target's column may be there; it is not read.

    Example: [bold]loadstone predict -M fitted --data new.csv -o predictions.csv[/]
    """
    levels = None if quantiles is None else _levels(quantiles)
    options.need(context, overwrite="out")
    if out is not None and out.exists() and not overwrite:
        raise UsageError(f"the output '{out}' exists", "Choose another, or pass --overwrite to replace it")
    if out is not None:
        render.check_file("-o", out)
    from loadstone.context.api import predict

    predictions = predict(model, data, base=base, quantiles=levels, device=device)
    columns = {name: column.tolist() for name, column in predictions.columns.items()}
    facts = {"data": str(data), "model": model, "task": predictions.task, "columns": columns}
    if out is not None:
        render.write_file(out, _csv(predictions))
        log.info("%s: %d rows", out, predictions.rows)
    render.result(json_to, facts, lambda: None if out else render.write(_csv(predictions)))


def _csv(predictions: Predictions) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(predictions.columns)
    for row in zip(*predictions.columns.values(), strict=True):
        writer.writerow([cell if isinstance(cell, str) else f"{cell:.9g}" for cell in row])
    return text.getvalue()


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        levels = ()
    if not levels or not all(0 < level < 1 for level in levels):
        raise UsageError(f"--quantiles {text} are not probabilities", "Example: --quantiles 0.1,0.9")
    return levels

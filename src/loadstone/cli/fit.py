"""`loadstone fit`: a table or a prompt is read once, and its keys and values are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loadstone.cli import options, render
from loadstone.context.results import PromptFit, TableFit

_TABLE, _PROMPT = "Tables", "Prompts"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("fit", no_args_is_help=True)(command)


def command(
    model: Annotated[
        str | None,
        typer.Option(
            "-M",
            "--model",
            metavar="BASE",
            help="Model that reads it: a PFN (default builtin:tiny-pfn), TabPFN checkpoint or language model.",
            rich_help_panel=options.INPUT,
        ),
    ] = None,
    out: options.Out = None,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Table of training rows: .csv, .tsv or .parquet.", rich_help_panel=_TABLE
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column to predict.", rich_help_panel=_TABLE)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classification or regression; by default inferred from the column.", rich_help_panel=_TABLE
        ),
    ] = None,
    prompt: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompt for a language model: .txt, or .json with chat messages.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What the language model computes in: auto (default), float32, bfloat16, float16.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    checkpoint: options.Checkpoint = None,
    trust_remote_code: options.TrustRemoteCode = False,
    follow_links: options.FollowLinks = False,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of stored keys and values (default: the model's): bfloat16, int8; TabPFN int8, fp8; "
            "prompts also fp8, hqqN, quantoN.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    json_to: options.Json = None,
) -> None:
    """Read a table or a prompt once with a frozen model, and keep its keys and values as a context without weights.

    A table's context answers `predict` and `eval --data`; a prompt's is put before every text of `eval -M`.

    Example: [bold]loadstone fit --table train.csv --target species -o fitted[/]
    """
    from loadstone.context.api import fit

    result = fit(
        model,
        out,
        table=table,
        target=target,
        task=task,
        prompt=prompt,
        cache_dtype=cache_dtype,
        dtype=dtype,
        device=device,
        checkpoint=checkpoint,
        overwrite=overwrite,
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
    )
    render.result(json_to, result.to_json(), lambda: _show(result))


def _show(result: TableFit | PromptFit) -> None:
    rows = _prompt_rows(result) if isinstance(result, PromptFit) else _table_rows(result)
    render.console().print(render.table("", ["", ""], rows), markup=False)
    if result.file_bytes is None:
        line = "Dry run: nothing was written."
    else:
        line = f"{result.out}: {render.size(result.file_bytes)}, {result.seconds} s"
    render.console().print(line, markup=False)


def _table_rows(fit: TableFit) -> list[list[str]]:
    categorical = f", {len(fit.categorical)} of them categorical" if fit.categorical else ""
    classes = f" of {len(fit.classes)} classes" if fit.classes else ""
    rows = [
        ["base", fit.base],
        ["task", f"{fit.task} of '{fit.target}'{classes}"],
        ["training rows", f"{fit.rows:,}"],
        ["features", f"{fit.features}{categorical}"],
    ]
    if fit.cache_bytes is not None:
        rows.append(["cache", f"{render.size(fit.cache_bytes)} in {fit.cache_dtype or 'the default dtype'}"])
    if fit.dry_run and fit.predicted_bytes is not None:
        rows.append(["context", f"{render.size(fit.predicted_bytes)} predicted"])
    return rows


def _prompt_rows(fit: PromptFit) -> list[list[str]]:
    recipe = "not quantized" if fit.recipe == "none" else f"quantized by {fit.recipe}"
    template = " by the chat template" if fit.template else ""
    rows = [
        ["base", f"{fit.base} ({recipe})"],
        ["prompt", f"{fit.prompt}: {fit.tokens:,} tokens{template}"],
        ["computed in", fit.dtype],
    ]
    if fit.bytes is not None:
        rows.append(["cache", f"{render.size(fit.bytes)} in {fit.cache_dtype}"])
    elif fit.predicted_bytes is not None:
        rows.append(["cache", f"{render.size(fit.predicted_bytes)} predicted, in {fit.cache_dtype}"])
    return rows

"""Options that several commands share, each defined once, and the checks that every command makes of its options."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from loadstone.cli import render
from loadstone.errors import UsageError

INPUT, OUTPUT, RUN = "Input", "Output", "Run"


def _check_json(value: str | None) -> str | None:
    if value is not None and value != "-":
        render.check_file("--json", Path(value))
    return value


Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="NAME",
        help="Of a training run: newest (default), best, a step or a folder.",
        rich_help_panel=INPUT,
    ),
]


def _follow(context: typer.Context, value: bool) -> bool:
    if value:
        from loadstone.artifact.files import following_links

        context.with_resource(following_links())
    return value


FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="Read files that are links out of the model directory.",
        callback=_follow,
        rich_help_panel=INPUT,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that came with the model.", rich_help_panel=INPUT
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="DIR",
        help="Of an adapter or a context: its base model, if it is not where that says.",
        rich_help_panel=INPUT,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", metavar="DIR", help="Directory to write.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=OUTPUT)
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[FILE|-]",
        help="Write the result as JSON to FILE; alone, or with -, to stdout.",
        callback=_check_json,
        rich_help_panel=OUTPUT,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="Where to compute: auto, cpu, cuda, cuda:N.", rich_help_panel=RUN
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and write nothing.", rich_help_panel=RUN)
]


def given(context: typer.Context) -> dict[str, str]:
    """The options on the command line: parameter name -> flag, such as ``{"dry_run": "--dry-run"}``."""
    found = {}
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name and source is not None and source.name == "COMMANDLINE":
            found[option.name] = max(option.opts, key=len)
    return found


def need(context: typer.Context, **needed: str) -> None:
    """Raise `UsageError` for an option given without the one it goes with: ``need(context, worst="kl")``."""
    flags = given(context)
    for name, other in needed.items():
        if name in flags and other not in flags:
            raise UsageError(
                f"{flags[name]} has no effect without --{other.replace('_', '-')}", f"Leave {flags[name]} out"
            )


def only(context: typer.Context, allowed: Collection[str], reason: str) -> None:
    """Raise `UsageError` for the first option given that is not ``allowed``; ``reason`` ends the sentence."""
    for name, flag in given(context).items():
        if name not in allowed:
            raise UsageError(f"{flag} has no effect {reason}", f"Leave {flag} out")

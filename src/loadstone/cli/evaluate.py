"""``loadstone eval``: parse, call, render."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadstone.cli import render
from loadstone.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from loadstone.evaluation.run import Outcome

EXAMPLE = """
[bold]Examples[/]

  loadstone eval -M tiny-w4

  loadstone eval -M run/checkpoint-900 -M tiny-w4 -M tiny-qat-w4 --data held-out.jsonl

  loadstone eval -M tiny-w4 --baseline run/checkpoint-900 --fail-if 'dloss>0.03@95' --json result.json
"""
# What a fitted table's evaluation takes of the options below.
FOR_TABLES = {"models", "data", "base", "device", "fail_if", "json_to"}
MODELS, TEXT, HOW, RESULT = "Models", "Text and protocol", "How to compute", "Results and gates"


def register(app: typer.Typer) -> None:
    """Add the ``eval`` command to the application."""
    app.command(
        "eval", epilog=EXAMPLE, short_help="Measure models on text, and what quantization cost them."
    )(evaluate)


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Option(
            "-M",
            "--model",
            metavar="DIR",
            help="Model directory, of any kind, or a context; repeat to compare.",
            rich_help_panel=MODELS,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Model the others are compared with, or its saved --json; otherwise the first -M.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Of a context: its base model, where it is not the recorded one.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Checkpoint within a training run: newest, best, a step, or a path.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    no_checkpoint: Annotated[
        bool,
        typer.Option(
            "--no-checkpoint",
            help="Use the directory's own weights, not its checkpoints.",
            rich_help_panel=MODELS,
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run Python code that came with the model.", rich_help_panel=MODELS
        ),
    ] = False,
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH|NAME",
            help="Text: .txt .jsonl .json .csv .parquet, a directory, a dataset's "
            "name[:config], or in the package: [bold]sample[/], [bold]stories[/], [bold]austen[/].",
            rich_help_panel=TEXT,
        ),
    ] = "sample",
    text_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Column that holds the text. [dim]\\[default: text][/]", rich_help_panel=TEXT
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Split of a dataset: test, validation or train, the first there is.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N documents.", rich_help_panel=TEXT)
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="packed, strided, or rolling (as lm-eval does it).", rich_help_panel=TEXT
        ),
    ] = "packed",
    context_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens a window holds. [dim]\\[default: 1024, or the model's][/]",
            rich_help_panel=TEXT,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens a window moves by; below the context length: strided.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    separator: Annotated[
        str,
        typer.Option(
            metavar="auto|bos|eos|ID", help="Token that starts every document.", rich_help_panel=TEXT
        ),
    ] = "auto",
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Windows computed at once.", rich_help_panel=HOW)
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or auto.", rich_help_panel=HOW)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16, float16, or auto: fastest exact-enough one here.",
            rich_help_panel=HOW,
        ),
    ] = "auto",
    fast: Annotated[
        bool,
        typer.Option(
            "--fast/--no-fast",
            help="Keep dequantized weights where that gives the same bits; read common prefixes once.",
            rich_help_panel=HOW,
        ),
    ] = True,
    compile_layers: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the decoder layers (seconds of warm-up).", rich_help_panel=HOW
        ),
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read one layer at a time. [dim]\\[default: when the models do not fit the memory][/]",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Find finished scores here, by content, and keep new ones.",
            rich_help_panel=HOW,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where an interrupted run with the same cache stopped.",
            rich_help_panel=HOW,
        ),
    ] = False,
    kl: Annotated[
        bool,
        typer.Option(
            "--kl",
            help="Also KL divergence both ways and top-1 agreement with the baseline (both in memory).",
            rich_help_panel=RESULT,
        ),
    ] = False,
    worst: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="With --kl, list the N documents that diverge most.",
            rich_help_panel=RESULT,
        ),
    ] = 5,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Also lm-eval tasks, compared example by example.", rich_help_panel=RESULT
        ),
    ] = None,
    task_path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of task YAMLs besides lm-eval's own.", rich_help_panel=RESULT
        ),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed", help="Also prefill and decode speed, time to first token.", rich_help_panel=RESULT
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write an HTML page with pictures, and the pictures.", rich_help_panel=RESULT
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GATE",
            help="Exit 4 when so: 'dloss>0.03', 'ppl>20', 'dppl>1%', 'dloss>0.03@95'; repeatable.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    json_to: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE|-", help="Write the result as JSON; - is stdout.", rich_help_panel=RESULT
        ),
    ] = None,
) -> None:
    """Measure models on text: loss, perplexity and bits per byte with standard errors, and the paired
    difference to a baseline on the same tokens. Any directory is loaded the one way that is right for it;
    no flag says how."""
    from loadstone.artifact.context_file import PREFIX, context_kind

    kinds = [context_kind(Path(model)) for model in models]
    if any(kind is not None and kind != PREFIX for kind in kinds):
        from loadstone.cli import contexts

        _refuse_for_tables(context)
        return contexts.evaluate(
            models, data=data, base=base, device=device, fail_if=fail_if or [], json_to=json_to
        )
    if base is not None and PREFIX not in kinds:
        raise UsageError(f"--base {base} is for contexts", "Leave it out")
    from loadstone.evaluation.results.gates import parse_gate

    if os.environ.get("RANK", "0") != "0":
        # Under torchrun the first process speaks for all.
        logging.getLogger("loadstone").setLevel(logging.ERROR)
    gates = tuple(parse_gate(g) for g in fail_if or ())
    size = _batch_size(batch_size)
    if json_to is not None and json_to != "-":
        render.check_file("--json", Path(json_to))
    if report is not None:
        from loadstone.evaluation.results.report import check_report

        check_report(report)

    from loadstone.evaluation.options import Options
    from loadstone.evaluation.run import evaluate as run

    outcome = run(
        Options(
            models=tuple(models),
            base=base,
            baseline=baseline,
            data=data,
            text_column=text_column,
            split=split,
            limit=limit,
            protocol=protocol,
            context_length=context_length,
            stride=stride,
            separator=separator,
            batch_size=size,
            device=device,
            dtype=dtype,
            checkpoint=checkpoint,
            no_checkpoint=no_checkpoint,
            trust_remote_code=trust_remote_code,
            divergence=kl,
            worst=worst,
            fast=fast,
            compile=compile_layers,
            stream=stream,
            cache=cache,
            resume=resume,
            tasks=tuple(filter(None, map(str.strip, (tasks or "").split(",")))),
            task_path=task_path,
            speed=speed,
            gates=gates,
        ),
        bar=lambda label, total: render.progress(Path(label).name, total),
    )
    if not outcome.first:
        return
    if json_to == "-":
        render.print_json(outcome.as_json())
    else:
        if json_to is not None:
            render.write_file(Path(json_to), render.to_json(outcome.as_json()))
        _render(outcome)
    if report is not None:
        from loadstone.evaluation.results.report import write_report
        from loadstone.evaluation.results.tables import describe

        page = write_report(outcome, report, describe(outcome.task.protocol))
        logging.getLogger("loadstone").info("report: %s", page)
    if outcome.failures:
        raise GateFailed("; ".join(v.describe() for v in outcome.failures))


def _refuse_for_tables(context: typer.Context) -> None:
    """An option that says nothing about a fitted table is refused, not ignored."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is not None and source.name == "COMMANDLINE" and option.name not in FOR_TABLES:
            raise UsageError(
                f"{option.opts[0]} is about language models; a fitted context is evaluated on a table",
                "Leave it out",
            )


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size {text!r} is neither a positive number nor auto")
    return int(text)


def _render(outcome: Outcome) -> None:
    from rich.text import Text

    from loadstone.evaluation.results.tables import describe, tables

    protocol = outcome.task.protocol
    out = render.console()

    def line(*parts: str | tuple[str, str]) -> None:
        # Never wrapped, and never markup: paths and text of documents may hold anything.
        out.print(Text.assemble(*parts), soft_wrap=True)

    line(describe(protocol))
    for columns, rows in tables(outcome.records):
        render.print_whole(render.table("", columns, rows, right=tuple(range(1, len(columns)))))
    line(f"± one standard error, by bootstrap over {protocol.resampled}")
    for record in outcome.records:
        for worst in record.get("worst_documents", ()):
            at = f"document {worst['document']}: KL {worst['kl']:.4f}, Δ loss {worst['delta_loss']:+.4f}"
            peak = f"worst token KL {worst['worst_token_kl']:.2f}: …{worst['before']}[{worst['worst_token']}]"
            line(render.printable(f"{record['path']}: {at}; {' '.join(peak.split())}"))
    for verdict in outcome.verdicts:
        state = ("failed", "red") if verdict.failed else ("passed", "green")
        line(f"gate {verdict.gate} ", state, f" for {verdict.model}: {verdict.value:.6g}")

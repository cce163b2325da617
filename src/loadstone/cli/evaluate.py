"""`loadstone eval`: measure models and compare them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadstone.cli import options, render
from loadstone.errors import GateFailed

if TYPE_CHECKING:
    from loadstone.evaluation.result import Evaluation

EXAMPLE = """
[bold]Examples[/]

  loadstone eval -M tiny-w4

  loadstone eval -M run/checkpoint-900 -M tiny-w4 -M tiny-qat-w4 --data held-out.jsonl

  loadstone eval -M tiny-w4 --baseline run/checkpoint-900 --fail-if 'dloss>0.03@95' --json result.json
"""
_TEXT = "Text and protocol"
log = logging.getLogger(__name__)


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
            rich_help_panel=options.INPUT,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Model the others are compared with, or its saved --json; otherwise the first -M.",
            rich_help_panel=options.INPUT,
        ),
    ] = None,
    base: options.Base = None,
    checkpoint: options.Checkpoint = None,
    no_checkpoint: Annotated[
        bool,
        typer.Option(
            "--no-checkpoint",
            help="Use the directory's own weights, not its checkpoints.",
            rich_help_panel=options.INPUT,
        ),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    native_kernels: Annotated[
        bool,
        typer.Option(
            "--native-kernels",
            help="Run weights of other quantizers on their format's own kernels instead of decoding them.",
            rich_help_panel=options.INPUT,
        ),
    ] = False,
    follow_links: options.FollowLinks = False,
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH|NAME",
            help="Text: .txt .jsonl .json .csv .parquet .arrow, compressed or not, a directory, a dataset's "
            "name[:config], or in the package: [bold]sample[/], [bold]stories[/], [bold]austen[/].",
            rich_help_panel=_TEXT,
        ),
    ] = "sample",
    text_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column that holds the text. [dim]\\[default: text][/]",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Split of a dataset: test, validation or train, the first there is.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N documents.", rich_help_panel=_TEXT)
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Conversations (messages, or prompt and completion) in the chat template.",
            rich_help_panel=_TEXT,
        ),
    ] = False,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="packed, strided, or rolling (as lm-eval does it). [dim]\\[default: packed; rolling with --chat][/]",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens a window holds. [dim]\\[default: 1024, or the model's][/]",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens a window moves by; below the context length: strided.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    separator: Annotated[
        str,
        typer.Option(
            metavar="auto|bos|eos|ID", help="Token that starts every document.", rich_help_panel=_TEXT
        ),
    ] = "auto",
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Windows computed at once.", rich_help_panel=options.RUN)
    ] = "auto",
    device: options.Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16, float16, or auto: float32 on a CPU, the stored dtype on a GPU.",
            rich_help_panel=options.RUN,
        ),
    ] = "auto",
    fast: Annotated[
        bool,
        typer.Option(
            "--fast/--no-fast",
            help="Cache dequantized weights where that gives the same bits; read common prefixes once.",
            rich_help_panel=options.RUN,
        ),
    ] = True,
    compile_layers: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the decoder layers. [dim]\\[default: on a GPU, where a long text saves more time][/]",
            rich_help_panel=options.RUN,
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read one layer at a time. [dim]\\[default: when the models do not fit the memory][/]",
            rich_help_panel=options.RUN,
            show_default=False,
        ),
    ] = None,
    activations: Annotated[
        bool,
        typer.Option(
            "--activations",
            help="Round inputs of layers as vLLM does (compressed-tensors artifacts: W8A8, FP8 dynamic, NVFP4, MXFP8).",
            rich_help_panel=options.RUN,
        ),
    ] = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="tensor[=N]",
            help="Under torchrun: divide each copy of a model among N ranks (default: all).",
            rich_help_panel=options.RUN,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Store finished scores here, and reuse them for the same content.",
            rich_help_panel=options.RUN,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an interrupted run from its cache.",
            rich_help_panel=options.RUN,
        ),
    ] = False,
    kl: Annotated[
        bool,
        typer.Option(
            "--kl",
            help="Also KL divergence both ways and top-1 agreement with the baseline (both in memory).",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    worst: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="With --kl, list the N documents that diverge most.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = 5,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Also lm-eval tasks, compared example by example.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    task_path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of task YAMLs besides lm-eval's own.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Also prefill and decode speed, time to first token.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write an HTML page with pictures, and the pictures.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GATE",
            help="Exit with code 4 if the condition holds: 'dloss>0.03', 'ppl>20', 'dppl>1%', "
            "'dloss>0.03@95', 'accuracy<0.9'; repeatable.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    json_to: options.Json = None,
) -> None:
    """Measure models on text: loss, perplexity and bits per byte with standard errors, and the paired
    difference to a baseline on the same tokens. How a directory must be loaded is found out from its files."""
    if os.environ.get("RANK", "0") != "0":
        # Under torchrun the first process speaks for all.
        logging.getLogger("loadstone").setLevel(logging.ERROR)
    options.need(context, worst="kl", task_path="tasks")
    _refuse_for_tables(context, models)
    from loadstone.evaluation.api import evaluate as run

    result = run(
        models,
        data=data,
        baseline=baseline,
        base=base,
        checkpoint=checkpoint,
        no_checkpoint=no_checkpoint,
        trust_remote_code=trust_remote_code,
        native_kernels=native_kernels,
        text_column=text_column,
        split=split,
        limit=limit,
        chat=chat,
        protocol=protocol,
        context_length=context_length,
        stride=stride,
        separator=separator,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        fast=fast,
        compile=compile_layers,
        stream=stream,
        activations=activations,
        parallel=parallel,
        cache=cache,
        resume=resume,
        kl=kl,
        worst=worst,
        tasks=tuple(filter(None, map(str.strip, (tasks or "").split(",")))),
        task_path=task_path,
        speed=speed,
        report=report,
        fail_if=fail_if or (),
        progress=lambda label, total: render.progress(Path(label).name, total),
    )
    if not result.first:
        return
    failed = GateFailed("; ".join(v.describe() for v in result.failures)) if result.failures else None
    try:
        render.result(json_to, result.as_json(), lambda: _render(result))
    except Exception as error:
        # Nothing that happens to the output may hide that a gate failed.
        if failed is not None:
            log.error("the result cannot be written: %s", error)
            raise failed from error
        raise
    if failed is not None:
        raise failed


def _refuse_for_tables(context: typer.Context, models: list[str]) -> None:
    """Refuse options that do not apply to fitted tables, also when they are given with their default value."""
    from loadstone.artifact.context_file import TABLE_KINDS, context_kind
    from loadstone.evaluation.options import refuse_for_tables

    if any(context_kind(Path(model)) in TABLE_KINDS for model in models):
        refuse_for_tables(
            [name for name in options.given(context) if name not in ("json_to", "fail_if", "follow_links")]
        )


def _render(result: Evaluation) -> None:
    from rich.text import Text

    from loadstone.evaluation.results.tables import tables

    out = render.console()

    def line(*parts: str | tuple[str, str]) -> None:
        # Never wrapped, and never markup: paths and text of documents may hold anything.
        out.print(Text.assemble(*parts), soft_wrap=True)

    line(result.description)
    for table in tables(result.records):
        right = tuple(range(table.left, len(table.columns)))
        render.print_whole(render.table("", table.columns, table.rows, right=right))
    if result.note:
        line(result.note)
    for record in result.records:
        if record.get("inputs"):
            line(f"{record['path']}: inputs rounded to {record['inputs']}")
    for record in result.records:
        for worst in record.get("worst_documents", ()):
            at = f"document {worst['document']}: KL {worst['kl']:.4f}, Δ loss {worst['delta_loss']:+.4f}"
            peak = f"worst token KL {worst['worst_token_kl']:.2f}: …{worst['before']}[{worst['worst_token']}]"
            line(f"{record['path']}: {at}; {' '.join(peak.split())}")
    for verdict in result.verdicts:
        state = ("failed", "red") if verdict.failed else ("passed", "green")
        line(f"gate {verdict.gate} ", state, f" for {verdict.model}: {verdict.value:.6g}")

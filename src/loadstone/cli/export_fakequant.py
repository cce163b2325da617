"""`loadstone export-fakequant`: a checkpoint whose weights are rounded to a format and stored as plain
tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loadstone.cli import render
from loadstone.errors import UsageError

if TYPE_CHECKING:
    from loadstone.fakequant.export import Exported
    from loadstone.fakequant.plan import ExportPlan

_INPUT, _OUTPUT, _FORMAT, _RUN = "Input", "Output", "Format", "Run"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export-fakequant", no_args_is_help=True)(command)


def command(
    model: Annotated[
        Path, typer.Option("-M", "--model", help="Checkpoint or training run.", rich_help_panel=_INPUT)
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory to write.", rich_help_panel=_OUTPUT)
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="fp8, int8, int4, nvfp4, mxfp8, mxfp4, w4a8 (options after a colon: int4:block=64), or a "
            "torchao recipe.",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option("--rules", metavar="FILE.yaml", help="Formats by module.", rich_help_panel=_FORMAT),
    ] = None,
    activations: Annotated[
        bool,
        typer.Option(
            "--activations",
            help="Keep quantizers for layer inputs too, as the format has them.",
            rich_help_panel=_FORMAT,
        ),
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="TEXT",
            help="Text that input ranges are measured on (file, data set, or sample); implies --activations.",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    calibrate_limit: Annotated[
        int, typer.Option(metavar="N", help="Documents to calibrate on.", rich_help_panel=_FORMAT)
    ] = 32,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache", metavar="fp8", help="Quantize keys and values too.", rich_help_panel=_FORMAT
        ),
    ] = None,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie", help="Store two tensors where rules fold one side of a tie.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    remote_code: Annotated[
        str,
        typer.Option(
            "--remote-code",
            metavar="strip|copy",
            help="Model code in the directory: left out, or copied whole.",
            rich_help_panel=_OUTPUT,
        ),
    ] = "strip",
    emit: Annotated[
        str | None,
        typer.Option(
            "--emit", metavar="modelopt", help="Also write ModelOpt's state file.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=_OUTPUT)
    ] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Of a training run: newest (default), best, a step or a folder.", rich_help_panel=_INPUT
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run Python code that came with the model.", rich_help_panel=_INPUT
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where weights are folded: auto, cpu, cuda, cuda:N.", rich_help_panel=_RUN)
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.", rich_help_panel=_RUN)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Fold a number format into a checkpoint's weights, so that its accuracy can be measured on any hardware.

    The output holds plain tensors and loads anywhere; quantizers of layer inputs lie beside them.

    Example: [bold]loadstone export-fakequant -M run/checkpoint-900 --format nvfp4 -o tiny-fq[/]
    """
    if out is None and not dry_run:
        raise UsageError("export-fakequant needs -o OUT", "Or pass --dry-run to see what would be written")
    if format is None and rules is None:
        raise UsageError(
            "no format is named", "Pass --format (fp8, int8, int4, nvfp4, mxfp8, …) or --rules FILE"
        )
    # What is wrong with the words of the command is said before anything heavy is imported.
    from loadstone.fakequant.options import make_options

    documents = None
    if calibrate is not None:
        from loadstone.text.corpus import read_corpus

        documents = read_corpus(calibrate, limit=calibrate_limit).documents
    options = make_options(
        format=format,
        rules=rules,
        activations=activations,
        calibrate=documents,
        kv_cache=kv_cache,
        untie=untie,
        remote_code=remote_code,
        emit=emit,
        device=device,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    from loadstone.artifact import detect
    from loadstone.fakequant.run import plan_for, run_directory
    from loadstone.loading.loader import import_libraries
    from loadstone.writing.publish import check_output

    artifact = detect(model, checkpoint=checkpoint)
    if out is not None:
        check_output(artifact.root, out, overwrite or dry_run)
    import_libraries()
    plan = plan_for(artifact, options)
    if dry_run:
        return _show_plan(plan, out, as_json)
    assert out is not None
    with render.progress(f"export {out.name}", plan.nbytes, unit_bytes=True) as advance:
        done = run_directory(artifact, plan, out, options, on_progress=advance)
    _show_done(done, as_json)


def _summary(plan: ExportPlan) -> dict[str, Any]:
    return {
        "format": str(plan.rules.default) if plan.rules.default else None,
        "rules": [str(rule) for rule in plan.rules.rules],
        "bytes": plan.nbytes,
        "files": len(plan.files),
        "folded": len(plan.folded),
        "tensors": [{"what": what, "count": count, "bytes": size} for what, count, size in plan.summary],
        "aliases": plan.aliases,
        "untied": list(plan.untied),
    }


def _show_plan(plan: ExportPlan, out: Path | None, as_json: bool) -> None:
    if as_json:
        return render.print_json({"dry_run": True, "out": str(out) if out else None} | _summary(plan))
    _print_summary(plan)
    render.console().print("Dry run: nothing was written.")


def _show_done(done: Exported, as_json: bool) -> None:
    if as_json:
        extra = {"out": str(done.out), "seconds": round(done.seconds, 3), "quantizers": len(done.quantizers)}
        return render.print_json(extra | _summary(done.plan) | {"sha256": done.files})
    _print_summary(done.plan)
    kept = f", {len(done.quantizers)} quantizers of inputs" if done.quantizers else ""
    render.console().print(
        f"{done.out}: {len(done.plan.folded)} weights folded{kept}, {render.size(done.plan.nbytes)} in "
        f"{len(done.plan.files)} file(s), {done.seconds:.1f} s",
        markup=False,
        soft_wrap=True,
    )


def _print_summary(plan: ExportPlan) -> None:
    rows = [[what, str(count), render.size(size)] for what, count, size in plan.summary]
    rows.append(["total", str(len(plan.steps)), render.size(plan.nbytes)])
    render.console().print(render.table("", ["weights", "tensors", "bytes"], rows, right=(1, 2)))
    for name in plan.untied:
        render.console().print(f"untied: {name} becomes a tensor of its own", markup=False)

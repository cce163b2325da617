"""`loadstone export-fakequant`: write a checkpoint with fake-quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loadstone.cli import options, render
from loadstone.errors import UsageError

if TYPE_CHECKING:
    from loadstone.fakequant import Exported, ExportPlan

_FORMAT = "Format"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export-fakequant", no_args_is_help=True)(command)


def command(
    context: typer.Context,
    model: Annotated[
        Path, typer.Option("-M", "--model", help="Checkpoint or training run.", rich_help_panel=options.INPUT)
    ],
    out: options.Out = None,
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
        typer.Option(
            "--rules", metavar="FILE", help="YAML file: a format for each module.", rich_help_panel=_FORMAT
        ),
    ] = None,
    activations: Annotated[
        bool,
        typer.Option(
            "--activations",
            help="Also keep the format's quantizers of layer inputs.",
            rich_help_panel=_FORMAT,
        ),
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="PATH|NAME",
            help="Text to measure input ranges on, as eval's --data; implies --activations.",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    calibrate_limit: Annotated[
        int,
        typer.Option(
            "--calibrate-limit",
            metavar="N",
            min=1,
            help="Documents to calibrate on.",
            rich_help_panel=_FORMAT,
        ),
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
            "--untie",
            help="Store tied weights separately if the rules quantize only one of them.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    remote_code: Annotated[
        str,
        typer.Option(
            "--remote-code",
            metavar="strip|copy",
            help="Python code in the model directory: leave it out, or copy it.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = "strip",
    emit: Annotated[
        str | None,
        typer.Option(
            "--emit",
            metavar="modelopt",
            help="Also write ModelOpt's state file.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Take over the finished files of a killed run.",
            rich_help_panel=options.RUN,
        ),
    ] = True,
    checkpoint: options.Checkpoint = None,
    trust_remote_code: options.TrustRemoteCode = False,
    base: options.Base = None,
    follow_links: options.FollowLinks = False,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json_to: options.Json = None,
) -> None:
    """Write a checkpoint with fake-quantized (quantized, then dequantized) weights.

    It shows what a number format costs in accuracy on any hardware: the weights are plain tensors that load anywhere.

    Example: [bold]loadstone export-fakequant -M run/checkpoint-900 --format nvfp4 -o tiny-fq[/]
    """
    options.need(context, calibrate_limit="calibrate")
    if out is None and not dry_run:
        raise UsageError("export-fakequant needs -o OUT", "Or pass --dry-run to see what would be written")
    if format is None and rules is None:
        raise UsageError(
            "no format is named", "Pass --format (fp8, int8, int4, nvfp4, mxfp8, …) or --rules FILE"
        )
    from loadstone.fakequant import export_fakequant, plan_export

    if dry_run:
        plan = plan_export(
            model, out, format=format, rules=rules, activations=activations, calibrate=calibrate, kv_cache=kv_cache,
            untie=untie, remote_code=remote_code, emit=emit, checkpoint=checkpoint, overwrite=True,
            trust_remote_code=trust_remote_code, base=base,
        )  # fmt: skip
        facts = {"dry_run": True, "out": str(out) if out else None} | _summary(plan)
        return render.result(json_to, facts, lambda: _print_plan(plan))
    assert out is not None
    with render.stages({"write": f"export {out.name}"}) as advance:
        done = export_fakequant(
            model, out, format=format, rules=rules, activations=activations, calibrate=calibrate,
            calibrate_limit=calibrate_limit, kv_cache=kv_cache, untie=untie, remote_code=remote_code, emit=emit,
            checkpoint=checkpoint, device=device, overwrite=overwrite, resume=resume,
            trust_remote_code=trust_remote_code, base=base, on_progress=advance,
        )  # fmt: skip
    # Of several ranks the first one shows the result.
    if done.files:
        facts = {"out": str(out), "seconds": round(done.seconds, 3), "quantizers": len(done.quantizers)}
        facts |= _summary(done.plan) | {"sha256": done.files}
        render.result(json_to, facts, lambda: _print_done(done))


def _summary(plan: ExportPlan) -> dict[str, Any]:
    return {
        "format": str(plan.rules.default) if plan.rules.default else None,
        "rules": [str(rule) for rule in plan.rules.rules],
        "bytes": plan.nbytes,
        "files": len(plan.shards),
        "folded": len(plan.folded),
        "tensors": [{"what": what, "count": count, "bytes": size} for what, count, size in plan.summary],
        "aliases": plan.aliases,
        "untied": list(plan.untied),
    }


def _print_plan(plan: ExportPlan) -> None:
    _print_summary(plan)
    render.console().print("Dry run: nothing was written.")


def _print_done(done: Exported) -> None:
    _print_summary(done.plan)
    kept = f", {len(done.quantizers)} input quantizers" if done.quantizers else ""
    render.console().print(
        f"{done.out}: {len(done.plan.folded)} weights fake-quantized{kept}, {render.size(done.plan.nbytes)} in "
        f"{len(done.plan.shards)} file(s), {done.seconds:.1f} s",
        markup=False,
        soft_wrap=True,
    )


def _print_summary(plan: ExportPlan) -> None:
    rows = [[what, str(count), render.size(size)] for what, count, size in plan.summary]
    rows.append(["total", str(len(plan.steps)), render.size(plan.nbytes)])
    render.console().print(render.table("", ["weights", "tensors", "bytes"], rows, right=(1, 2)))
    for name in plan.untied:
        render.console().print(f"untied: {name} is stored separately", markup=False)

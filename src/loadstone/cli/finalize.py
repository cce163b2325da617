"""`loadstone finalize`: a checkpoint becomes a self-describing artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loadstone.cli import options, render
from loadstone.cli.finalize_tables import show_done, show_plan
from loadstone.errors import UsageError

_QUANT = "Quantization"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("finalize", no_args_is_help=True)(command)


def command(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Option(
            "-M",
            "--model",
            metavar="DIR",
            help="Checkpoint or training run.",
            rich_help_panel=options.INPUT,
        ),
    ] = None,
    checkpoint: options.Checkpoint = None,
    trust_remote_code: options.TrustRemoteCode = False,
    base: options.Base = None,
    follow_links: options.FollowLinks = False,
    out: options.Out = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Dtype of unquantized tensors: auto (as stored), float32, bfloat16, float16.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = "auto",
    max_shard_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Size of the largest file, such as 500MB.", rich_help_panel=options.OUTPUT
        ),
    ] = "2GB",
    overwrite: options.Overwrite = False,
    json_to: options.Json = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Recipe by name, options after a colon: intx4-weight-only:group_size=64",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Recipe file: a recipe for each module, by rules (docs/recipes.md).",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How weights are rounded: affine, mse or hqq; with --calibrate gptq (default), awq or smoothquant.",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|NAME",
            help="Text to calibrate on, layer by layer: what eval's --data takes.",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int, typer.Option(metavar="N", min=512, help="Number of calibration tokens.", rich_help_panel=_QUANT)
    ] = 32768,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="Leave modules unquantized: a name or part of it, a glob or re:REGEX; repeatable.",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How quantized weights are stored: torchao, or compressed-tensors, for vLLM and SGLang.",
            rich_help_panel=_QUANT,
        ),
    ] = "torchao",
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Show every recipe and exit.", rich_help_panel=_QUANT)
    ] = False,
    device: options.Device = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Take over the finished shards of a run that was killed.",
            rich_help_panel=options.RUN,
        ),
    ] = True,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Load the output as transformers does and compare every tensor with its source.",
            rich_help_panel=options.RUN,
        ),
    ] = False,
    dry_run: options.DryRun = False,
    of_fit: Annotated[
        list[str] | None,
        typer.Option("--fit", "--prefix", "--target", "--task", "--cache-dtype", hidden=True),
    ] = None,
) -> None:
    """Turn a checkpoint into a self-describing artifact, quantized or plain.

    Example: [bold]loadstone finalize -M run/checkpoint-900 --quantize int8-dynamic-act-int4-weight -o tiny-w4[/]
    """
    if of_fit:
        raise UsageError(
            "--fit, --prefix, --target, --task and --cache-dtype belong to `loadstone fit`",
            "Run loadstone fit --table FILE --target NAME -o OUT, or loadstone fit -M DIR --prompt FILE -o OUT",
        )
    if list_recipes:
        options.only(context, {"list_recipes", "json_to"}, "with --list-recipes")
        return _list_recipes(json_to)
    options.need(context, calibrate_tokens="calibrate")
    if model is None or (out is None and not dry_run):
        raise UsageError("finalize needs -M DIR and -o OUT", "See `loadstone finalize --help`")
    if quantize and recipe:
        raise UsageError("--quantize and --recipe exclude each other", "Keep one")
    from loadstone.finalization import finalize, plan_finalize

    if dry_run:
        plan = plan_finalize(
            model, out, recipe=recipe or quantize, algorithm=algorithm, calibrate=calibrate, skip=skip or (),
            layout=layout, checkpoint=checkpoint, dtype=dtype, max_shard_size=max_shard_size, device=device,
            overwrite=True, trust_remote_code=trust_remote_code, base=base,
        )  # fmt: skip
        return show_plan(plan, out, json_to)
    assert out is not None
    labels = {stage: f"{stage} {out.name}" for stage in ("calibrate", "write", "verify")}
    with render.stages(labels, in_layers=("calibrate",)) as advance:
        done = finalize(
            model, out, recipe=recipe or quantize, algorithm=algorithm, calibrate=calibrate,
            calibrate_tokens=calibrate_tokens, skip=skip or (), layout=layout, checkpoint=checkpoint, dtype=dtype,
            max_shard_size=max_shard_size, device=device, overwrite=overwrite, resume=resume, verify=verify,
            trust_remote_code=trust_remote_code, base=base, on_progress=advance,
        )  # fmt: skip
    # Of several ranks the first one shows the result.
    if done.files:
        show_done(done, json_to)


def _list_recipes(json_to: str | None) -> None:
    from dataclasses import asdict

    from loadstone.quantization import RECIPES

    recipes = [
        {
            "name": r.name,
            "options": asdict(r.scheme),
            "devices": list(r.devices),
            "nominal_bits": r.nominal_bits,
            "stored_bits": round(r.stored_bits(), 3),
            "needs": r.needs,
            "instead": r.instead,
        }
        for r in RECIPES.values()
    ]
    render.result(json_to, recipes, _print_recipes)


def _print_recipes() -> None:
    from dataclasses import asdict

    from loadstone.quantization import RECIPES

    rows = [
        [
            r.name,
            ", ".join(f"{k}={v}" for k, v in asdict(r.scheme).items()) or "-",
            " ".join(r.devices),
            f"{r.nominal_bits:g}",
            f"{r.stored_bits():.2f}",
            r.needs or "-",
        ]
        for r in RECIPES.values()
    ]
    columns = ["recipe", "options", "devices", "bits", "stored", "needs"]
    render.console().print(render.table("", columns, rows, right=(3, 4)))
    render.console().print(
        "bits: per weight by name; stored: on disk for a 4096x4096 bf16 weight, scales and zero points included.\n"
        "torchao stores intx values one to a byte, whatever their name says."
    )

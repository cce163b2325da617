"""`loadstone finalize`: a checkpoint becomes a self-describing artifact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadstone.cli import render
from loadstone.cli.finalize_tables import show_done, show_plan
from loadstone.errors import UsageError

if TYPE_CHECKING:
    from loadstone.finalization import FinalizePlan
    from loadstone.quantization import MixedRecipe, Recipe
    from loadstone.ranks import Ranks

_INPUT, _OUTPUT, _QUANT, _RUN = "Input", "Output", "Quantization", "Run"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("finalize", no_args_is_help=True)(command)


def command(
    model: Annotated[
        Path | None, typer.Option("-M", "--model", help="Checkpoint or training run.", rich_help_panel=_INPUT)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory to write.", rich_help_panel=_OUTPUT)
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="RECIPE",
            help="Recipe by name, options after a colon: intx4-weight-only:group_size=64",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="Recipe file: a scheme for each module, by rules (see docs/recipes.md).",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            "--algorithm",
            help="How weights are rounded: affine, mse or hqq; with --calibrate gptq, awq or smoothquant.",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    calibrate_on: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="Calibrate on this text (as eval's --data), layer by layer; by GPTQ, or as --algorithm says.",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int,
        typer.Option("--calibrate-tokens", min=512, help="Tokens of it to use.", rich_help_panel=_QUANT),
    ] = 32768,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="MODULE",
            help="Leave modules unquantized: a name or part of it, a glob or re:REGEX (repeat).",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Show every recipe and exit.", rich_help_panel=_QUANT)
    ] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            help="Of a training run: newest (default), best, a step or a folder.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Dtype of unquantized tensors: auto (as stored), float32, bfloat16, float16.",
            rich_help_panel=_OUTPUT,
        ),
    ] = "auto",
    max_shard_size: Annotated[
        str,
        typer.Option(
            "--max-shard-size", help="Largest file to write, such as 500MB.", rich_help_panel=_OUTPUT
        ),
    ] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=_OUTPUT)
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Take over the finished shards of a killed run.",
            rich_help_panel=_RUN,
        ),
    ] = True,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Then read every tensor back and compare it with a fresh quantization.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option("--device", help="Where to quantize: auto, cpu, cuda, cuda:N.", rich_help_panel=_RUN),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.", rich_help_panel=_RUN)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_RUN)
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run Python code that came with the model.", rich_help_panel=_INPUT
        ),
    ] = False,
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
        return _list_recipes(as_json)
    if model is None or (out is None and not dry_run):
        raise UsageError("finalize needs -M DIR and -o OUT", "See `loadstone finalize --help`")
    # What is wrong with the words of the command is said before anything heavy is imported.
    asked = _asked_recipe(quantize, recipe_file)
    max_bytes = _parse_size(max_shard_size)
    from loadstone.loading import plan as load_plan
    from loadstone.quantization.qat import recorded_recipe
    from loadstone.quantization.recipe_file import recipes_in
    from loadstone.quantization.schemes import CALIBRATED, rounding_of

    artifact = load_plan(
        model, dtype=dtype, checkpoint=checkpoint, trust_remote_code=trust_remote_code
    ).artifact
    recipe = recorded_recipe(artifact, asked)
    if calibrate_on and recipe is None:
        raise UsageError("--calibrate is about quantization", "Add --quantize RECIPE or --recipe FILE")
    algorithm = "gptq" if calibrate_on and not algorithm else algorithm
    recipe = _with_options(recipe, algorithm, skip)
    for each in recipes_in(recipe):
        if rounding_of(each.scheme) in CALIBRATED and not calibrate_on:
            raise UsageError(f"{each} needs text to calibrate with", "Add --calibrate FILE")
    from loadstone.finalization import make_plan
    from loadstone.finalization.plan import refuse_quantized, weight_dtype
    from loadstone.loading.devices import quantize_device
    from loadstone.loading.loader import import_libraries
    from loadstone.quantization.quantize import check_runs
    from loadstone.writing.publish import check_output

    refuse_quantized(artifact)
    import_libraries()
    where = quantize_device(device)
    for each in recipes_in(recipe):
        stored = weight_dtype(artifact, dtype, trust_remote_code=trust_remote_code)
        check_runs(each, where, stored)
    plan = make_plan(
        artifact,
        recipe,
        dtype=dtype,
        device=where,
        skip=skip,
        max_shard_bytes=max_bytes,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        check_output(plan.source.root, out, overwrite or dry_run)
    if dry_run:
        return show_plan(plan, out, as_json)
    assert out is not None
    from loadstone.finalization.calibrate import discard
    from loadstone.finalization.run import finalize
    from loadstone.finalization.verify import verify as verify_artifact
    from loadstone.ranks import joined

    with joined() as ranks:
        if ranks.size > 1 and where.startswith("cuda"):
            where = f"cuda:{ranks.local_rank}"
        if calibrate_on:
            plan = _calibrated(plan, calibrate_on, calibrate_tokens, out, where, trust_remote_code, ranks)
        share = sum(step.source_bytes for shard in plan.shards[ranks.rank :: ranks.size] for step in shard)
        with render.progress(f"finalize {out.name}", share, unit_bytes=True) as advance:
            done = finalize(
                plan, out, device=where, overwrite=overwrite, resume=resume, ranks=ranks, on_progress=advance
            )
    if ranks.rank != 0:
        return
    verified = None
    if verify:
        total = sum(step.source_bytes for step in plan.steps)
        with render.progress(f"verify {out.name}", total, unit_bytes=True) as advance:
            verified = verify_artifact(plan, out, device=where, on_progress=advance)
    discard(out)
    show_done(done, verified, as_json)


def _calibrated(
    plan: FinalizePlan, data: str, tokens: int, out: Path, device: str, trust_remote_code: bool, ranks: Ranks
) -> FinalizePlan:
    """The plan with its weights rounded on ``data``, by rank 0: the text in order, cut into rows of 512 tokens."""
    import torch

    from loadstone.finalization.calibrate import calibrate, calibrated
    from loadstone.loading import load_tokenizer
    from loadstone.text.corpus import read_corpus

    tokenizer = load_tokenizer(plan.source, trust_remote_code=trust_remote_code)
    limit = int(plan.config.get("max_position_embeddings") or 512)
    length = min(512, limit)
    ids: list[int] = []
    for document in read_corpus(data).documents:
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // length
    if count == 0:
        raise UsageError(f"--calibrate {data} holds {len(ids)} tokens", f"At least {length} are needed")
    rows = torch.tensor(ids[: count * length]).view(count, length)
    layers = len({re.sub(r"^(.*?\.\d+)\..*", r"\1", s.name) for s in plan.steps if s.scheme})
    if ranks.rank == 0:
        with render.progress(f"calibrate on {rows.numel():,} tokens", layers) as advance:
            calibrate(
                plan, rows, out, device=device, trust_remote_code=trust_remote_code, on_progress=advance
            )
    ranks.wait()
    return calibrated(plan, rows, out)


def _asked_recipe(quantize: str | None, recipe_file: Path | None) -> Recipe | MixedRecipe | None:
    from loadstone.quantization import parse_recipe, read_recipe

    if quantize and recipe_file:
        raise UsageError("--quantize and --recipe exclude each other", "Keep one")
    return read_recipe(recipe_file) if recipe_file else parse_recipe(quantize) if quantize else None


def _with_options(
    recipe: Recipe | MixedRecipe | None, algorithm: str | None, skip: list[str] | None
) -> Recipe | MixedRecipe | None:
    from loadstone.quantization.recipe_file import with_algorithm

    for flag, value in (("--skip", skip), ("--algorithm", algorithm)):
        if value and recipe is None:
            raise UsageError(f"{flag} is about quantization", "Add --quantize RECIPE or --recipe FILE")
    return with_algorithm(recipe, algorithm) if recipe and algorithm else recipe


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)i?B?", text.strip())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--max-shard-size '{text}' is no size", "Examples: 500MB, 5GB")
    scale = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2]]
    return int(float(match[1]) * scale)


def _list_recipes(as_json: bool) -> None:
    from dataclasses import asdict

    from loadstone.quantization import RECIPES

    if as_json:
        return render.print_json(
            [
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
        )
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

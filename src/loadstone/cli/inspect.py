"""`loadstone inspect`: what a directory is, how it would be loaded, and what is wrong with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loadstone.cli import options, render
from loadstone.errors import ArtifactError, LoadstoneError

if TYPE_CHECKING:
    from loadstone.artifact.report import Group, Report
    from loadstone.loading import LoadPlan

SCHEMA = 1


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect", no_args_is_help=True)(command)


def command(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory or training run.")],
    checkpoint: options.Checkpoint = None,
    base: options.Base = None,
    follow_links: options.FollowLinks = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read every file and compare it with loadstone.json's sha256.",
            rich_help_panel=options.INPUT,
        ),
    ] = False,
    json_to: options.Json = None,
) -> None:
    """Show what a directory is, how it would be loaded and why, and everything that is wrong with it.

    Reads headers only, without torch. Exits with 3 when the directory could not be loaded, or when stock transformers
    or a server would fail on it or compute something else.

    Example: [bold]loadstone inspect tiny-w4[/]
    """
    from loadstone.artifact.context_file import is_context

    if is_context(directory):
        from loadstone.cli import context_facts

        options.only(context, {"directory", "verify", "follow_links", "json_to"}, "on a fitted context")
        problem = context_facts.inspect(directory, verify=verify, json_to=json_to)
        if problem is not None:
            raise typer.Exit(problem.exit_code)
        return
    from loadstone.artifact.report import collect

    report = collect(directory, checkpoint=checkpoint, base=base)
    problems: list[LoadstoneError] = list(report.problems)
    load_plan = None
    if not problems:
        load_plan, refusal = _plan(report)
        problems += refusal
    mismatches = _verify(report) if verify else None
    problems += mismatches or []
    failed = [*problems, *report.serving]
    render.result(
        json_to,
        as_dict(report, load_plan, problems, mismatches),
        lambda: _show(report, load_plan, problems, mismatches),
    )
    if failed:
        raise typer.Exit(failed[0].exit_code)


def _plan(report: Report) -> tuple[LoadPlan | None, list[LoadstoneError]]:
    from loadstone.loading import plan

    # The plan is printed here in full: its log line would say the same again.
    quiet = logging.getLogger("loadstone.loading")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        return plan(report.artifact), []
    except LoadstoneError as error:
        return None, [error]
    finally:
        quiet.setLevel(level)


def _verify(report: Report) -> list[LoadstoneError]:
    from loadstone.artifact.manifest import verify_files

    try:
        return [
            ArtifactError(text, "Copy the directory again") for text in verify_files(report.artifact.path)
        ]
    except ArtifactError as error:
        return [error]


def as_dict(
    report: Report,
    load_plan: LoadPlan | None,
    problems: list[LoadstoneError],
    mismatches: list[LoadstoneError] | None,
) -> dict[str, Any]:
    """The documented JSON form; names stay as they are once released."""
    artifact = report.artifact
    return {
        "schema": SCHEMA,
        "path": str(artifact.path),
        "root": str(artifact.root),
        "loadable": not problems,
        "problems": [{"message": p.message, "remedy": p.remedy, "exit_code": p.exit_code} for p in problems],
        "notes": list(report.notes),
        "kind": artifact.kind,
        "evidence": list(artifact.evidence),
        "plan": _plan_dict(load_plan),
        "model_type": artifact.config.get("model_type"),
        "architectures": artifact.config.get("architectures") or [],
        "parameters": report.parameters,
        "bytes": report.nbytes,
        "file_bytes": report.file_bytes,
        "dtypes": {d.dtype: {"tensors": d.tensors, "bytes": d.nbytes} for d in report.dtypes},
        "quantization": _quantization_dict(report),
        "serving": _serving_dict(report),
        "unquantized": [_group_dict(g) for g in report.plain],
        "tied": [list(names) for names in report.tied],
        "sidecars": report.sidecars,
        "weights": {
            "format": artifact.weights.format,
            "files": list(artifact.weight_files),
            "index": artifact.weights.index,
        },
        "manifest": _manifest_dict(report),
        "verified": None if mismatches is None else not mismatches,
    }


def _plan_dict(load_plan: LoadPlan | None) -> dict[str, Any] | None:
    if load_plan is None:
        return None
    return {
        "load_path": load_plan.load_path,
        "reason": load_plan.reason,
        "device": load_plan.device,
        "dtype": load_plan.dtype,
        "messages": list(load_plan.messages),
    }


def _quantization_dict(report: Report) -> dict[str, Any] | None:
    artifact = report.artifact
    if not report.quantized and artifact.quant_method is None:
        return None
    return {
        "method": artifact.quant_method,
        "recipe": _recipe(report),
        "parameters": sum(g.parameters for g in report.quantized),
        "bytes": sum(g.nbytes for g in report.quantized),
        "nominal_bits_per_weight": _rounded(report.nominal_bits),
        "stored_bits_per_weight": _rounded(report.stored_bits),
        "groups": [_group_dict(g) | {"nominal_bits_per_weight": g.nominal_bits} for g in report.quantized],
    }


def _serving_dict(report: Report) -> dict[str, Any] | None:
    from loadstone.artifact.servers import largest_tensor_parallel, runs_of

    runs = runs_of(report.artifact)
    if not runs:
        return None
    return {
        "runs": [run._asdict() for run in runs],
        "largest_tensor_parallel": largest_tensor_parallel(report.artifact),
        "problems": [{"message": p.message, "remedy": p.remedy} for p in report.serving],
    }


def _group_dict(group: Group) -> dict[str, Any]:
    return {
        "pattern": group.pattern,
        "count": group.count,
        "type": group.type,
        "parameters": group.parameters,
        "bytes": group.nbytes,
        "stored_bits_per_weight": _rounded(group.stored_bits),
        "note": group.note,
    }


def _manifest_dict(report: Report) -> dict[str, Any] | None:
    if report.manifest is None:
        return None
    return {
        key: report.manifest.get(key) for key in ("format_version", "recipe", "source", "versions", "command")
    }


def _rounded(bits: float | None) -> float | None:
    return None if bits is None else round(bits, 3)


def _recipe(report: Report) -> str | None:
    """The recipe in loadstone's spelling, read off the tensors; None when they are of several or of none."""
    samples = report.recipe_samples
    if not samples:
        schemes = dict.fromkeys(group.type for group in report.quantized)
        return ", ".join(schemes) or None
    from loadstone.quantization.schemes import recipe_for, spell
    from loadstone.quantization.torchao_config import scheme_of

    try:
        found = {spell(recipe_for(scheme_of(tensor))) for tensor in samples}
    except (LoadstoneError, LookupError, TypeError, ValueError):
        return None
    return found.pop() if len(found) == 1 else None


def _show(
    report: Report,
    load_plan: LoadPlan | None,
    problems: list[LoadstoneError],
    mismatches: list[LoadstoneError] | None,
) -> None:
    from rich.table import Table
    from rich.text import Text

    from loadstone.artifact.builtin import shown
    from loadstone.artifact.servers import runs_of

    artifact = report.artifact
    parts: list[Any] = [
        Text.assemble((render.one_line(shown(artifact.root)), "bold"), "  ", (artifact.kind, "bold cyan"))
    ]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in _rows(report, load_plan, mismatches):
        # Text, never markup: names in a model may hold brackets or escape sequences.
        grid.add_row(label, Text(render.one_line(text)))
    parts += [grid, ""]
    if report.quantized:
        parts.append(_group_table("Quantized", report.quantized, "class", "bits/weight"))
    if report.plain:
        parts.append(
            _group_table("Not quantized" if report.quantized else "Tensors", report.plain, "dtype", "")
        )
    if runs := runs_of(artifact):
        parts.append(render.runs_table(runs))
    for note in report.notes[:_SHOWN]:
        parts.append(Text.assemble(("note: ", "yellow"), render.one_line(note)))
    for problem in problems[:_SHOWN]:
        parts.append(Text.assemble(("problem: ", "bold red"), render.one_line(str(problem))))
    for problem in report.serving[:_SHOWN]:
        parts.append(Text.assemble(("elsewhere: ", "bold red"), render.one_line(str(problem))))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        parts.append(Text(f"Cannot be loaded: {count}", style="bold red"))
    out = render.console()
    with out.capture() as captured:
        for part in parts:
            out.print(part, soft_wrap=isinstance(part, Text))
    # rich pads every line to the table's width, which only gets in the way of a pipe.
    print("".join(line.rstrip() + "\n" for line in captured.get().splitlines()), end="")


def _rows(
    report: Report, load_plan: LoadPlan | None, mismatches: list[LoadstoneError] | None
) -> list[tuple[str, str]]:
    from loadstone.artifact.kinds import PFN
    from loadstone.artifact.servers import largest_tensor_parallel

    artifact = report.artifact
    rows = [("evidence", line) for line in artifact.evidence]
    if artifact.path != artifact.root:
        rows.append(("weights in", str(artifact.path)))
    if load_plan is not None:
        rows.append(("would load", f"{load_plan.load_path}: {load_plan.reason}"))
    names = artifact.config.get("architectures") or [artifact.config.get("model_type")]
    if names[0] is not None:
        rows.append(("model", str(names[0])))
    if report.nbytes:
        files = artifact.weight_files
        where = files[0] if len(files) == 1 else f"{len(files)} files"
        rows.append(("parameters", f"{report.parameters:,}"))
        bits = f", {report.nbytes * 8 / report.parameters:.2f} bits/parameter" if report.parameters else ""
        rows.append(("stored", f"{render.size(report.nbytes)} in {where} ({artifact.weights.format}){bits}"))
        rows.append(("dtypes", ", ".join(f"{d.dtype} {render.size(d.nbytes)}" for d in report.dtypes)))
    if report.quantized:
        recipe = _recipe(report)
        rows.append(("recipe", recipe or "mixed"))
        rows.append(("bits/weight", _bits(report)))
    if (gpus := largest_tensor_parallel(artifact)) is not None:
        rows.append(("divides", f"among up to {gpus} GPUs (tensor parallel)"))
    for names in report.tied[:_SHOWN]:
        rows.append(("tied", " = ".join(names)))
    have = dict.fromkeys(file for file in report.sidecars.values() if file)
    missing = [what for what, file in report.sidecars.items() if file is None and what != "processor"]
    rows.append(("sidecars", ", ".join(have) or "none"))
    if missing and artifact.kind != PFN:
        rows.append(("missing", ", ".join(missing)))
    if report.manifest:
        versions = report.manifest.get("versions")
        made = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""
        rows.append(("made with", made or "loadstone"))
        source = report.manifest.get("source")
        decoded = source.get("decoded") if isinstance(source, dict) else None
        if isinstance(decoded, list):
            chain = [*map(str, decoded), str(report.manifest.get("recipe") or "plain weights")]
            rows.append(("rounded", " → ".join(chain)))
    if mismatches is not None:
        rows.append(("verified", "every file agrees with loadstone.json" if not mismatches else "no"))
    return rows


def _bits(report: Report) -> str:
    nominal, stored = report.nominal_bits or 0.0, report.stored_bits or 0.0
    text = f"{nominal:.3g} nominal, {stored:.2f} stored"
    if stored > 1.5 * nominal:
        text += f" (a value of {nominal:.3g} bits takes a whole byte in this format)"
    return text


def _group_table(title: str, groups: tuple[Group, ...], kind: str, last: str) -> Any:
    rows = [
        [
            str(group.count),
            group.pattern,
            group.type,
            f"{group.parameters:,}",
            render.size(group.nbytes),
            f"{group.nominal_bits:g} → {group.stored_bits:.2f}" if last else group.note,
        ]
        for group in groups[:_SHOWN]
    ]
    if len(groups) > _SHOWN:
        rows.append(["", f"… and {len(groups) - _SHOWN} more groups (--json lists all)"])
    return render.table(title, ["tensors", "", kind, "weights", "stored", last], rows, right=(0, 3, 4))


_SHOWN = 24

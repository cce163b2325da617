"""`loadstone.fit` and `loadstone.predict`: a context from a table or a prompt, and a context's predictions."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.builtin import PREFIX as BUILTIN
from loadstone.artifact.context_file import is_context, read_context
from loadstone.context.results import PromptFit, TableFit
from loadstone.errors import UsageError
from loadstone.loading.devices import cpu_by_default
from loadstone.writing.publish import check_output

if TYPE_CHECKING:
    from loadstone.context.tables.predictions import Predictions

DEFAULT_BASE = f"{BUILTIN}tiny-pfn"


@cpu_by_default
def fit(
    base: str | Path | None = None,
    out: str | Path | None = None,
    *,
    table: str | Path | None = None,
    target: str | None = None,
    task: str | None = None,
    prompt: str | Path | None = None,
    cache_dtype: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    checkpoint: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
) -> TableFit | PromptFit:
    """Read a table or a prompt once with a frozen model, and write the keys and values as the directory ``out``.

        loadstone.fit("builtin:tiny-pfn", "fitted", table="train.csv", target="species")
        loadstone.fit("smollm2", "few-shot", prompt="prompt.txt")

    ``table`` (.csv, .tsv, .parquet): ``base`` is a PFN or a TabPFN checkpoint (default ``builtin:tiny-pfn``),
    ``target`` the column to predict, ``task`` classification or regression (default: inferred from the column).
    ``prompt`` (.txt, or .json with chat messages): ``base`` is a causal language model, ``dtype`` what it computes in
    (default: float32 on a CPU, the stored dtype on a GPU); ``checkpoint`` picks one of a training run.
    ``cache_dtype``: dtype of the stored keys and values (default: the model's). ``device``: auto, cpu, cuda, cuda:N.
    ``dry_run`` reads no weights and writes nothing; ``out`` may be None then.

    Raises `UsageError` for an option that has no meaning for what is fitted, an input that does not fit the base, or an
    existing output without ``overwrite``; `ArtifactError` for a base that cannot be loaded; `MissingError` for a
    package that is not installed.
    """
    if (table is None) == (prompt is None):
        raise UsageError(
            "fit reads a table or a prompt",
            "Give --table FILE with --target NAME, or --prompt FILE: one of them",
        )
    if out is None and not dry_run:
        raise UsageError("fit needs an output", "Add -o OUT, or --dry-run to see the plan only")
    out = None if out is None else Path(out)
    if table is not None:
        _refuse(
            "--table",
            {"--dtype": dtype, "--checkpoint": checkpoint, "--trust-remote-code": trust_remote_code},
        )
        if target is None:
            raise UsageError(
                "--table needs --target NAME, the column to predict", "Name a column of the table"
            )
        request = _Request(
            str(base or DEFAULT_BASE), Path(table), out, cache_dtype, device, overwrite, dry_run
        )
        _check_output(request)
        return _fit_table(request, target, task)
    assert prompt is not None
    _refuse("--prompt", {"--target": target, "--task": task})
    if base is None:
        raise UsageError("--prompt needs a language model", "Add -M DIR")
    request = _Request(str(base), Path(prompt), out, cache_dtype, device, overwrite, dry_run)
    _check_output(request)
    return _fit_prompt(request, dtype or "auto", checkpoint, trust_remote_code)


@cpu_by_default
def predict(
    model: str | Path,
    data: str | Path,
    *,
    base: str | Path | None = None,
    quantiles: tuple[float, ...] | None = None,
    device: str = "auto",
) -> Predictions:
    """Predictions of the fitted context ``model`` for each row of the table ``data``.

    ``quantiles`` (each between 0 and 1) are a regression's, by default 0.05, 0.5 and 0.95. The target column may be in
    the table; it is not read. Raises `UsageError` for quantiles of a classification, `SchemaMismatch` for other columns
    than the fitted ones, and what `loadstone.load_context` raises.
    """
    from loadstone.context.fitted_tables import open_table
    from loadstone.context.tables.predictions import QUANTILES

    for level in quantiles or ():
        if not 0 < level < 1:
            raise UsageError(f"the quantile {level:g} is not between 0 and 1", "Example: --quantiles 0.1,0.9")
    context = open_table(model, base, device=device)
    if quantiles is not None and context.task == "classification":
        raise UsageError(f"--quantiles: '{model}' predicts classes, which have no quantiles", "Leave it out")
    return context.predict(data, quantiles=quantiles or QUANTILES, measure=False)


@dataclass(frozen=True)
class _Request:
    """The options that tables and prompts share. ``source``: the table or prompt."""

    base: str
    source: Path
    out: Path | None
    cache_dtype: str | None
    device: str
    overwrite: bool
    dry_run: bool


def _refuse(what: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if value is not None and value is not False:
            raise UsageError(f"{option} has no meaning with {what}", "Leave it out")


def _check_output(request: _Request) -> None:
    """Refuse before any work what `write_context` would refuse after it."""
    if request.out is None:
        return
    for source in (Path(request.base), request.source):
        check_output(source, request.out, request.overwrite or request.dry_run)
    if request.out.exists() and not is_context(request.out) and not request.dry_run:
        raise UsageError(
            f"the output '{request.out}' is not a fitted context", "It will not be replaced: choose another"
        )


def _written(out: Path, started: float) -> dict[str, Any]:
    """Facts about a context that was just written; ``started``: `time.monotonic` before the work."""
    return {
        "dry_run": False,
        "file_bytes": sum(path.stat().st_size for path in out.iterdir()),
        "seconds": round(time.monotonic() - started, 3),
    }


def _fit_table(request: _Request, target: str, task: str | None) -> TableFit:
    from loadstone.context.tabpfn import table as tabpfn

    if tabpfn.is_checkpoint(request.base):
        return _fit_tabpfn(request, target, task)
    from loadstone.artifact import detect
    from loadstone.artifact.detect import PFN
    from loadstone.context.pfn.fit import fit_table, plan_fit

    artifact = detect(request.base)
    if artifact.kind != PFN:
        raise UsageError(
            f"'{request.base}' is {artifact.kind}, and a table is fitted with an in-context model",
            f"Try -M {DEFAULT_BASE}",
        )
    plan = plan_fit(artifact, request.source, target, task=task, cache_dtype=request.cache_dtype)
    planned = _planned_table(request, plan, plan.cache_dtype, plan.total_bytes)
    if request.dry_run:
        return planned
    assert request.out is not None
    started = time.monotonic()
    context = fit_table(plan, source=request.base, device=request.device)
    context.save(request.out, overwrite=request.overwrite)
    return replace(planned, bytes=context.nbytes, **_written(request.out, started))


def _fit_tabpfn(request: _Request, target: str, task: str | None) -> TableFit:
    from loadstone.context.tabpfn.table import fit_table, plan_fit, save_table

    plan = plan_fit(request.base, request.source, target, task=task, cache_dtype=request.cache_dtype)
    planned = _planned_table(request, plan, request.cache_dtype, plan.cache_bytes)
    planned = replace(planned, architecture=plan.architecture)
    if request.dry_run:
        return planned
    assert request.out is not None
    started = time.monotonic()
    save_table(plan, fit_table(plan, device=request.device), request.out, overwrite=request.overwrite)
    file = read_context(request.out)
    return replace(
        planned,
        members=file.facts["cache"]["members"],
        cache_dtype=file.facts["cache"]["dtype"],
        cache_bytes=file.cache_bytes,
        bytes=file.tensor_bytes,
        **_written(request.out, started),
    )


def _planned_table(request: _Request, plan: Any, cache_dtype: str | None, nbytes: int | None) -> TableFit:
    """What both kinds of plan say. ``plan``: a `FitPlan` or a `TabpfnPlan`."""
    return TableFit(
        dry_run=True,
        out=None if request.out is None else str(request.out),
        base=request.base,
        table=str(request.source),
        target=plan.schema.target,
        task=plan.task,
        rows=plan.rows,
        features=len(plan.schema.names),
        categorical=sorted(plan.schema.categories),
        classes=list(plan.classes),
        cache_dtype=cache_dtype,
        cache_bytes=plan.cache_bytes,
        predicted_bytes=nbytes,
    )


def _fit_prompt(request: _Request, dtype: str, checkpoint: str | None, trust_remote_code: bool) -> PromptFit:
    from loadstone.context.prefix.run import plan_prefix, run_prefix

    plan = plan_prefix(
        request.base,
        request.source,
        cache_kind=request.cache_dtype,
        dtype=dtype,
        device=request.device,
        checkpoint=checkpoint,
        trust_remote_code=trust_remote_code,
    )
    planned = PromptFit(
        dry_run=True,
        out=None if request.out is None else str(request.out),
        base=request.base,
        prompt=str(request.source),
        recipe=plan.recipe,
        tokens=plan.length,
        template=plan.template,
        dtype=plan.dtype,
        cache_dtype=plan.cache_kind,
        predicted_bytes=plan.cache_bytes,
    )
    if request.dry_run:
        return planned
    assert request.out is not None
    started = time.monotonic()
    cache = run_prefix(plan, request.out, overwrite=request.overwrite)
    return replace(planned, bytes=cache.nbytes, **_written(request.out, started))

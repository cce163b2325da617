"""`finalize --prefix`: call and render. Parsing stays with the command."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.cli import render
from loadstone.cli.context_facts import closing, written
from loadstone.errors import UsageError

log = logging.getLogger("loadstone")


@dataclass(frozen=True)
class PrefixRequest:
    """The options of ``finalize --prefix``, as they stand on the line."""

    model: str
    out: Path | None
    prompt: Path
    cache_dtype: str | None
    dtype: str
    device: str
    checkpoint: str | None
    overwrite: bool
    dry_run: bool
    as_json: bool
    trust_remote_code: bool


def make_prefix(request: PrefixRequest) -> None:
    """``finalize --prefix``: tokenize the prompt, and unless it is a dry run read it with the model and save."""
    from loadstone.context.prefix.run import plan_prefix, run_prefix

    if request.out is not None and request.out.exists() and not request.overwrite and not request.dry_run:
        raise UsageError(
            f"the output '{request.out}' exists", "Choose another, or pass --overwrite to replace it"
        )
    plan = plan_prefix(
        request.model,
        request.prompt,
        cache_kind=request.cache_dtype,
        dtype=request.dtype,
        device=request.device,
        checkpoint=request.checkpoint,
        trust_remote_code=request.trust_remote_code,
    )
    summary: dict[str, Any] = {
        "dry_run": True,
        "out": str(request.out) if request.out else None,
        "base": request.model,
        "recipe": plan.recipe,
        "prompt": str(request.prompt),
        "tokens": plan.length,
        "template": plan.template,
        "dtype": plan.dtype,
        "cache_dtype": plan.cache_kind,
        "predicted_bytes": plan.cache_bytes,
    }
    if request.dry_run:
        _show_prefix_plan(summary, request.as_json)
        return
    assert request.out is not None
    started = time.monotonic()
    cache = run_prefix(plan, request.out, overwrite=request.overwrite)
    _show_prefix_plan(summary | {"bytes": cache.nbytes} | written(request.out, started), request.as_json)


def _show_prefix_plan(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        render.print_json(summary)
        return
    recipe = "not quantized" if summary["recipe"] == "none" else f"quantized by {summary['recipe']}"
    rendered = " by the chat template" if summary["template"] else ""
    rows = [
        ["base", f"{summary['base']} ({recipe})"],
        ["prompt", f"{summary['prompt']}: {summary['tokens']:,} tokens{rendered}"],
        ["computed in", summary["dtype"]],
    ]
    if "bytes" in summary:
        rows.append(["cache", f"{render.size(summary['bytes'])} in {summary['cache_dtype']}"])
    elif summary["predicted_bytes"] is not None:
        rows.append(
            ["cache", f"{render.size(summary['predicted_bytes'])} predicted, in {summary['cache_dtype']}"]
        )
    render.console().print(render.table("", ["", ""], rows), markup=False)
    render.console().print(closing(summary), markup=False)

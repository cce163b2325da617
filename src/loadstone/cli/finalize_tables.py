"""What `loadstone finalize` prints: the plan, by group and by module, and what was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.builtin import shown
from loadstone.cli import render

if TYPE_CHECKING:
    from loadstone.finalization import Finalized, FinalizePlan

_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def _groups(plan: FinalizePlan) -> list[tuple[str, str, int, int, int]]:
    """Steps summed by what is done and why: (action, reason, tensors, bytes before, bytes after)."""
    found: dict[tuple[str, str], list[int]] = {}
    for step in plan.steps:
        entry = found.get((step.action, step.reason))
        if entry is None:
            entry = found[step.action, step.reason] = [0, 0, 0]
        entry[0] += 1
        entry[1] += step.stored_bytes
        entry[2] += step.nbytes
    return [(action, reason, *counts) for (action, reason), counts in sorted(found.items(), reverse=True)]  # type: ignore[misc]


def _summary(plan: FinalizePlan) -> dict[str, Any]:
    return {
        "source": str(plan.source.path),
        "kind": plan.source.kind,
        "decoded": list(plan.source.decoded),
        "recipe": str(plan.recipe) if plan.recipe else None,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "shards": len(plan.shards),
        "tensors": [
            {"action": action, "reason": reason, "count": count, "bytes_before": before, "bytes_after": after}
            for action, reason, count, before, after in _groups(plan)
        ],
        "experts_left": _experts_left(plan),
        "modules": [
            {"module": module, "recipe": recipe, "why": why} for module, recipe, why in _modules(plan)
        ],
        "quantization_config": plan.config.get("quantization_config"),
        "runs": [run._asdict() for run in plan.runs],
    }


def _experts_left(plan: FinalizePlan) -> dict[str, int]:
    """Expert weights that a recipe leaves as they are, since they are fused on load: tensors and bytes."""
    left = [s for s in plan.steps if plan.recipe and not s.scheme and s.reason.startswith("fused experts")]
    return {"tensors": len(left), "bytes": sum(s.nbytes for s in left)}


def _modules(plan: FinalizePlan) -> list[tuple[str, str | None, str]]:
    """(module, recipe or None, why) for each matrix weight that a recipe decides about."""
    from loadstone.quantization import recipe_for

    if plan.recipe is None:
        return []
    spelled = {scheme: str(recipe_for(scheme)) for scheme in {step.scheme for step in plan.steps} if scheme}
    return [
        (step.name.removesuffix(".weight"), spelled[step.scheme] if step.scheme else None, step.reason)
        for step in plan.steps
        if step.scheme or step.reason != "not a matrix weight"
    ]


def _print_modules(plan: FinalizePlan) -> None:
    """`_modules` with the layers of a stack folded into one row where they agree."""
    folded: dict[tuple[str, str, str], list[str]] = {}
    for module, recipe, why in _modules(plan):
        parts = _NUMBER.split(module)
        folded.setdefault((".*".join(parts[::2]), recipe or "-", why), []).append(".".join(parts[1::2]))
    rows = [
        [pattern, _ranges(numbers) or "-", recipe, why] for (pattern, recipe, why), numbers in folded.items()
    ]
    title = f"{_recipe_name(plan)}, module by module"
    render.console().print(render.table(title, ["module", "layers", "recipe", "why"], rows))


def _recipe_name(plan: FinalizePlan) -> str:
    return getattr(plan.recipe, "file", "") or str(plan.recipe)


def _ranges(numbers: list[str]) -> str:
    """``['0', '1', '2', '5'] -> '0-2 5'``; longer numbers (layer and expert) are counted."""
    if not all(n.isdigit() for n in numbers):
        return "" if numbers == [""] else f"{len(numbers)} of them"
    found: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def show_plan(plan: FinalizePlan, out: Path | None, json_to: str | None) -> None:
    """The result of a dry run."""
    facts = {"dry_run": True, "out": str(out) if out else None} | _summary(plan)
    render.result(json_to, facts, lambda: _print_plan(plan))


def _print_plan(plan: FinalizePlan) -> None:
    console = render.console()
    _print_groups(plan)
    if plan.runs:
        console.print(render.runs_table(plan.runs))
    if plan.recipe:
        import json

        _print_modules(plan)
        block = plan.config["quantization_config"]
        if block.get("quant_type", {}).get("default", {}).get("_type") == "FqnToConfig":
            console.print(
                "Would write torchao's FqnToConfig, which names each module (--json shows it), to config.json"
            )
        else:
            console.print("Would write this quantization_config block to config.json:")
            console.print(json.dumps(block, indent=2), markup=False)
    console.print("Dry run: nothing was written.")


def show_done(done: Finalized, json_to: str | None) -> None:
    """The result of a finalize."""
    facts = {
        "out": str(done.out),
        "seconds": round(done.seconds, 3),
        "files": done.files,
        "verified_tensors": done.verified,
    }
    render.result(json_to, facts | _summary(done.plan), lambda: _print_done(done))


def _print_done(done: Finalized) -> None:
    _print_groups(done.plan)
    if done.plan.runs:
        render.console().print(render.runs_table(done.plan.runs))
    render.console().print(
        f"{done.out}: {len(done.files) + 1} files, {render.size(done.plan.bytes_after)} of weights "
        f"in {len(done.plan.shards)} shard(s), {done.seconds:.1f} s"
        + (f", {done.verified} tensors verified" if done.verified is not None else ""),
        markup=False,
        soft_wrap=True,
    )


def _print_groups(plan: FinalizePlan) -> None:
    rows = [
        [
            action if action != "quantize" else f"quantize ({_recipe_name(plan)})",
            reason or "-",
            str(count),
            render.size(before),
            render.size(after),
        ]
        for action, reason, count, before, after in _groups(plan)
    ]
    rows.append(
        ["total", "", str(len(plan.steps)), render.size(plan.bytes_before), render.size(plan.bytes_after)]
    )
    adapter = plan.source.adapter
    kind = f"from {' → '.join(plan.source.decoded)}" if plan.source.decoded else plan.source.kind
    title = f"{shown(plan.source.path)} ({kind})"
    if adapter is not None:
        title = f"{shown(adapter.directory)} merged into {shown(plan.source.path)}"
    experts = _experts_left(plan)
    render.console().print(
        render.table(title, ["action", "why", "tensors", "before", "after"], rows, right=(2, 3, 4))
    )
    if experts["tensors"]:
        share = experts["bytes"] / plan.bytes_after
        render.console().print(
            f"Not quantized: {experts['tensors']} expert weights, {render.size(experts['bytes'])}, {share:.0%} of the "
            "output. transformers fuses them into 3-D tensors, which torchao multiplies in float8 and int8 only: a "
            "recipe file can give them such a scheme; --layout compressed-tensors takes any."
        )

"""`inspect` of fitted contexts: what they hold, and the base they need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.builtin import PREFIX
from loadstone.artifact.context_errors import CorruptContext
from loadstone.artifact.context_file import CONTEXT_JSON
from loadstone.artifact.context_file import PREFIX as LANGUAGE_PREFIX
from loadstone.cli import render
from loadstone.errors import ArtifactError, LoadstoneError

if TYPE_CHECKING:
    from loadstone.artifact.context_file import ContextFile


def inspect(directory: Path, *, verify: bool, json_to: str | None) -> LoadstoneError | None:
    """``inspect`` of a fitted context: its facts, sizes and the base it needs. Returns what is wrong with it."""
    from loadstone.artifact.context_file import read_context

    try:
        context = read_context(directory, verify=verify)
    except ArtifactError as error:
        text = f"{directory}  context\nproblem: {error}\nCannot be loaded"
        problem = {"message": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
        render.result(
            json_to,
            {"schema": 1, "path": str(directory), "kind": "context", "problems": [problem]},
            lambda: render.console().print(text, markup=False),
        )
        return error
    is_prefix = context.facts["kind"] == LANGUAGE_PREFIX
    try:
        found = prefix_facts(context, verify) if is_prefix else facts(context, verify)
        render.result(json_to, found, lambda: _show_prefix(found) if is_prefix else _show_facts(found))
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and json_to not in (None, "-"):
            raise  # the output file's
        raise CorruptContext(
            f"{directory}/{CONTEXT_JSON}: a field is missing or of another type ({str(error)[:100]})",
            "Copy the directory again, or fit the context again",
        ) from None
    return None


def prefix_facts(context: ContextFile, verified: bool) -> dict[str, Any]:
    """The documented JSON form of what inspect says about a language-model prefix."""
    described, base = context.facts, context.facts["base"]
    kinds = [layer.get("kind") for layer in described["layers"]]
    return {
        "schema": 1,
        "path": str(context.path),
        "kind": "context",
        "context_kind": described["kind"],
        "problems": [],
        "prompt": described["prompt"],
        "contains_prompt": described["contains_prompt"],
        "cache": {**described["cache"], "bytes": context.cache_bytes},
        "layers": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "bytes": context.tensor_bytes,
        "file_bytes": context.file_bytes,
        "continuation": described.get("continuation"),
        "numerics": described["numerics"],
        "tokenizer": described["tokenizer"],
        "base": {
            "source": base.get("source"),
            "recipe": base.get("recipe"),
            "fingerprint": base.get("fingerprint"),
            "architecture": base["architecture"],
            "parameters": len(base["tensors"]),
            "found": _base_found(base.get("source"), context.path),
        },
        "verified": verified or None,
    }


def _show_prefix(found: dict[str, Any]) -> None:
    base, cache, prompt, tokenizer = found["base"], found["cache"], found["prompt"], found["tokenizer"]
    layers = ", ".join(f"{count} {kind}" for kind, count in found["layers"].items())
    template = tokenizer.get("chat_template_sha256")
    recipe = {None: "", "none": "; not quantized"}.get(base["recipe"], f"; quantized by {base['recipe']}")
    rows = [
        ["evidence", "context.json describes a language-model prefix"],
        ["prompt", f"{prompt['tokens']:,} tokens{' by the chat template' if prompt['template'] else ''}"],
        ["begins", str(prompt.get("preview", ""))],
        ["cache", f"{render.size(cache['bytes'])} in {cache['dtype']}; layers: {layers}"],
        ["stored", f"{render.size(found['file_bytes'])} in context.safetensors; no weights"],
        ["needs base", f"{_where(base)}{recipe}"],
        ["fingerprint", f"{str(base['fingerprint'])[:16]}…, {base['parameters']} tensors"],
        ["architecture", str(base["architecture"].get("model_type"))],
        [
            "needs tokenizer",
            f"{tokenizer['class']}, {tokenizer['tokens']:,} tokens, {tokenizer['sha256'][:16]}…"
            if tokenizer
            else "",
        ],
        ["needs template", f"{template[:16]}…" if template else "none" if tokenizer else ""],
        ["continues", _continuation(found["continuation"])],
        ["computes in", found["numerics"]["dtype"]],
        ["made with", f"torch {found['numerics']['torch']} on {found['numerics']['device']}"],
        ["use", "loadstone eval -M, or loadstone.load_context in Python"],
        ["disclosure", "keys and values give the prompt away: treat it as that text"],
    ]
    _print(found, rows)


def _continuation(found: dict[str, Any] | None) -> str:
    """How far tokens after a prefix were from one uncached pass when it was made."""
    if not found:
        return ""
    largest = max(found[name] for name in ("logits", "generation", "padded") if found[name] is not None)
    alone = "" if found["padding"] else "; texts of different lengths one at a time"
    return f"as one uncached pass does, to {largest:.1e} in log-probabilities{alone}"


def _print(found: dict[str, Any], rows: list[list[str]]) -> None:
    """What every kind of context begins and ends with, around its rows; those that say nothing are left out."""
    if found["verified"]:
        rows.append(["verified", "every byte is as it was written"])
    shown = [[label, text] for label, text in rows if text]
    render.console().print(f"{found['path']}  context ({found['context_kind']})", markup=False)
    render.console().print(render.table("", ["", ""], shown), markup=False)


def _where(base: dict[str, Any]) -> str:
    where = base["source"] or "a model made in memory"
    return f"{where} ({'here' if base['found'] else 'not here: name it with --base'})"


def facts(context: ContextFile, verified: bool) -> dict[str, Any]:
    """The documented JSON form of what inspect says about a context."""
    described, base = context.facts, context.facts["base"]
    return {
        "schema": 1,
        "path": str(context.path),
        "kind": "context",
        "context_kind": described["kind"],
        "problems": [],
        "task": described["task"],
        "rows": described["rows"],
        "features": described["features"],
        "feature_names": described["schema"].get("names") or [],
        "target": described["schema"].get("target"),
        "classes": described["classes"],
        "contains_training_labels": described["contains_training_labels"],
        "cache": {**described["cache"], "bytes": context.cache_bytes},
        "bytes": context.tensor_bytes,
        "file_bytes": context.file_bytes,
        "numerics": described["numerics"],
        **({"packages": described["packages"]} if "packages" in described else {}),
        "base": {
            "source": base.get("source"),
            "fingerprint": base.get("fingerprint"),
            "architecture": base["architecture"],
            "parameters": len(base["tensors"]),
            "found": _base_found(base.get("source"), context.path),
        },
        "verified": verified or None,
    }


def _base_found(source: str | None, directory: Path) -> bool:
    if source is None:
        return False
    if source.startswith(PREFIX):
        from loadstone.artifact.builtin import builtin_names

        return source.removeprefix(PREFIX) in builtin_names()
    return Path(source).exists() or (directory / source).is_dir()


def _cache_line(cache: dict[str, Any]) -> str:
    if not cache["layers"]:
        return "none: the training rows are read at each prediction"
    members = f", {cache['members']} members" if "members" in cache else ""
    return f"{render.size(cache['bytes'])} in {cache['dtype']}, {cache['layers']} layers{members}"


def _architecture_line(sizes: dict[str, Any]) -> str:
    if "width" in sizes:
        return f"width {sizes['width']}, {sizes['layers']} layers, {sizes['heads']} heads"
    several = sizes.get("models")
    first = several[0] if several else sizes
    width = first.get("embed_dim", first.get("emsize"))
    return f"{first.get('name')}, width {width}, {first.get('nlayers')} layers" + (
        f", {len(several)} models" if several else ""
    )


def _show_facts(found: dict[str, Any]) -> None:
    base, cache = found["base"], found["cache"]
    names = found["feature_names"]
    rows = [
        ["evidence", "context.json describes a fitted context"],
        ["task", f"{found['task']}" + (f" of '{found['target']}'" if found["target"] else "")],
        ["fitted on", f"{found['rows']:,} rows, {found['features']} features"],
        ["features", ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")],
        ["classes", ", ".join(str(label) for label in found["classes"])],
        ["cache", _cache_line(cache)],
        ["stored", f"{render.size(found['file_bytes'])} in context.safetensors; no weights"],
        ["needs base", _where(base)],
        ["fingerprint", f"{str(base['fingerprint'])[:16]}…, {base['parameters']} tensors"],
        ["architecture", _architecture_line(base["architecture"])],
        ["needs package", f"tabpfn {found['packages']['tabpfn']}" if found.get("packages") else ""],
        ["made with", f"torch {found['numerics']['torch']} on {found['numerics']['device']}"],
        ["use", "loadstone predict -M and eval -M --data, or loadstone.load_context in Python"],
        ["disclosure", "keys and values are made of the training rows and targets: treat it as that data"],
    ]
    _print(found, rows)

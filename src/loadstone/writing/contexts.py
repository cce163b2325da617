"""A fitted context's directory: ``context.safetensors``, written tensor by tensor, and ``context.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone._version import __version__
from loadstone.artifact.context_file import CONTEXT_JSON, CONTEXT_TENSORS, FORMAT_VERSIONS, digest, is_context
from loadstone.artifact.hashing import sha256_file
from loadstone.errors import UsageError
from loadstone.writing.publish import check_space, new_directory
from loadstone.writing.shards import write_tensors

if TYPE_CHECKING:
    import torch


def write_context(
    path: Path, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any], *, overwrite: bool
) -> Path:
    """Write a context as the directory ``path``, whole or not at all; returns it.

    ``facts``: what is particular to this context.json; format, hashes and versions are added. Tensors are written one
    after another, so this needs the memory of the largest of them. Raises `UsageError` for an output that exists, or is
    no context that could be replaced, `MissingError` for disk errors.
    """
    if overwrite and path.exists() and not is_context(path):
        raise UsageError(
            f"the output '{path}' is not a fitted context", "It will not be replaced: choose another"
        )
    check_space(sum(tensor.nbytes for tensor in tensors.values()), path)
    with new_directory(path, overwrite) as work:
        write_tensors(work / CONTEXT_TENSORS, tensors)
        whole = _complete(facts, work / CONTEXT_TENSORS)
        (work / CONTEXT_JSON).write_text(_lines(whole), encoding="utf-8")
    return path


def _lines(facts: dict[str, Any]) -> str:
    """JSON with a line for each key: short, and still read by eye."""
    rows = (
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
        for key, value in facts.items()
    )
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _complete(facts: dict[str, Any], tensors: Path) -> dict[str, Any]:
    """``facts`` with what every context.json holds: format, the tensors' hash, versions and its own digest."""
    whole = {"format": "loadstone-context", "format_version": FORMAT_VERSIONS[facts["kind"]]} | facts
    whole["files"] = {CONTEXT_TENSORS: {"sha256": sha256_file(tensors), "bytes": tensors.stat().st_size}}
    whole["versions"] = {"loadstone": __version__}
    return whole | {"digest": digest(whole)}

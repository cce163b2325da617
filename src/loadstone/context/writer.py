"""A context's files, written whole or not at all, and tensor by tensor: saving holds no second copy of a context.

safetensors' own writer wants all tensors in one dictionary on the CPU. Layout as it lays it
(https://github.com/huggingface/safetensors#format): by falling alignment, then name.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from loadstone import __version__
from loadstone.artifact.context_file import CONTEXT_JSON, CONTEXT_TENSORS, FORMAT_VERSION, digest, is_context
from loadstone.artifact.manifest import sha256_file
from loadstone.context.fingerprint import tensor_bytes
from loadstone.errors import UsageError
from loadstone.quantization.flatten import dtype_name


def write_context(
    path: Path, tensors: dict[str, Tensor], describe: Callable[[Path], dict[str, Any]], *, overwrite: bool
) -> Path:
    """Make the directory ``path`` of ``tensors`` and of what ``describe`` says once they are written; returns it.

    Tensors are written one after another, so this needs the memory of the largest of them. Raises `UsageError` for an
    existing output.
    """
    if path.exists() and not overwrite:
        raise UsageError(
            f"the output '{path}' exists", "Choose another, or pass overwrite (--overwrite) to replace it"
        )
    if path.exists() and not is_context(path):
        raise UsageError(
            f"the output '{path}' is no fitted context", "It will not be replaced: choose another"
        )
    work = path.with_name(f".{path.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        write_safetensors(work / CONTEXT_TENSORS, tensors)
        facts = describe(work / CONTEXT_TENSORS)
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        (work / CONTEXT_JSON).write_text(text, encoding="utf-8")
        if path.exists():
            old = path.with_name(f".{path.name}.replaced")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            work.rename(path)
            shutil.rmtree(old)
        else:
            work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return path


def finished(facts: dict[str, Any], tensors: Path) -> dict[str, Any]:
    """``facts`` with what every context.json holds: format, the tensors' hash, versions and its own digest."""
    whole = {"format": "loadstone-context", "format_version": FORMAT_VERSION} | facts
    whole["files"] = {CONTEXT_TENSORS: {"sha256": sha256_file(tensors), "bytes": tensors.stat().st_size}}
    whole["versions"] = {"loadstone": __version__}
    return whole | {"digest": digest(whole)}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors``, of any device, to ``path`` and sync it to disk; one of them at a time is on the CPU."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        end = position + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": dtype_name(tensor.dtype), "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, tensor in ordered:
            file.write(tensor_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())

"""Change what a context says and keep everything around it valid, as a forger would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loadstone.artifact.context_file import CONTEXT_JSON, CONTEXT_TENSORS, digest
from loadstone.artifact.hashing import sha256_file
from loadstone.context.tabpfn.stored import TREE


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change context.json; its digest and the hash of the tensors are computed again."""
    facts = json.loads((directory / CONTEXT_JSON).read_text())
    change(facts)
    path = directory / CONTEXT_TENSORS
    if isinstance(facts.get("files"), dict):
        facts["files"] = {CONTEXT_TENSORS: {"sha256": sha256_file(path), "bytes": path.stat().st_size}}
    facts["digest"] = digest(facts)
    (directory / CONTEXT_JSON).write_text(json.dumps(facts))


def rewrite_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors, and the hash of their file in context.json."""
    path = directory / CONTEXT_TENSORS
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    rewrite(directory, lambda facts: None)


def rewrite_tree(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON tree of the estimator, which lies among the tensors."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tree = json.loads(tensors[TREE].numpy().tobytes())
        change(tree)
        tensors[TREE] = torch.frombuffer(bytearray(json.dumps(tree).encode()), dtype=torch.uint8)

    rewrite_tensors(directory, edit)

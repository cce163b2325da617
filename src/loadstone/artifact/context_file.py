"""``context.json``: what a fitted context is, read and checked without torch and without trusting it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadstone.artifact.context_errors import (
    CorruptContext,
    FormatUnsupported,
    KindMismatch,
    UnsafeContent,
)
from loadstone.artifact.files import MAX_CONFIG_BYTES, check_inside, is_file, read_json
from loadstone.artifact.formats.safetensors import TensorInfo, read_header
from loadstone.artifact.hashing import sha256_file
from loadstone.errors import ArtifactError

CONTEXT_JSON = "context.json"
CONTEXT_TENSORS = "context.safetensors"
PFN, TABPFN, PREFIX = "pfn", "tabpfn", "llm-prefix"
# The version of each kind that is written and read. TabPFN estimators of version 2 were compressed.
FORMAT_VERSIONS = {PFN: 1, TABPFN: 3, PREFIX: 1}
KINDS = (PFN, TABPFN, PREFIX)
# Kinds that predict a column of a table.
TABLE_KINDS = (PFN, TABPFN)
# What a context of each kind is called, what it needs and what it is for.
KIND_NAMES = {
    PFN: "a fitted table (PFN)",
    TABPFN: "a fitted TabPFN estimator",
    PREFIX: "a language-model prefix",
}
KIND_USES = {
    PFN: "Use it with predict, or with eval --data on a table",
    TABPFN: "Use it with predict or eval --data on a table, or loadstone.load_context in Python",
    PREFIX: "Use it with eval on text or --tasks, or loadstone.load_context in Python",
}
# Other files may lie in a context's directory, but none that a loader could be tricked into running.
_UNSAFE_SUFFIXES = (
    ".pkl",
    ".pickle",
    ".joblib",
    ".pt",
    ".pth",
    ".bin",
    ".npy",
    ".npz",
    ".dill",
    ".tabpfn_fit",
    ".py",
)


@dataclass(frozen=True)
class ContextFile:
    """A fitted context as its files describe it: ``facts`` is context.json, ``tensors`` the header of its tensors."""

    path: Path
    facts: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    file_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors: the context in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values with their scales."""
        return sum(t.nbytes for name, t in self.tensors.items() if name.startswith("layers."))


def is_context(directory: Path) -> bool:
    """Whether the directory has a context.json."""
    return is_file(directory / CONTEXT_JSON)


def context_kind(directory: Path) -> str | None:
    """The kind in context.json, unchecked; None for a directory that is not a context."""
    if not is_context(directory):
        return None
    try:
        kind = read_json(check_inside(directory, CONTEXT_JSON), MAX_CONFIG_BYTES).get("kind")
    except ArtifactError:
        # `read_context` reports what is wrong with it.
        return ""
    return kind if isinstance(kind, str) else ""


def require_kind(directory: Path, *wanted: str, by: str) -> None:
    """Raise `KindMismatch` when the directory is a context of another kind than what ``by`` works with."""
    kind = context_kind(directory)
    if kind in KINDS and kind not in wanted:
        needs = " or ".join(KIND_NAMES[w] for w in wanted)
        raise KindMismatch(f"'{directory}' is {KIND_NAMES[kind]}, and {by} needs {needs}", KIND_USES[kind])


def read_context(directory: Path, *, verify: bool = False) -> ContextFile:
    """Read and check a fitted context's description and tensor headers; ``verify`` hashes the tensors too.

    Raises `FormatUnsupported` (version, kind), `UnsafeContent` (planted files, names that leave the directory) or
    `CorruptContext` (anything that is not as it was written).
    """
    _refuse_planted(directory)
    try:
        facts = read_json(check_inside(directory, CONTEXT_JSON), MAX_CONFIG_BYTES)
        _check_version(facts)
        if facts.get("digest") != digest(facts):
            raise CorruptContext(
                f"{CONTEXT_JSON}: its content changed since it was written (digest differs)", _RECOPY
            )
        _check_shape(facts)
        path = check_inside(directory, CONTEXT_TENSORS)
        if not is_file(path):
            raise CorruptContext(f"{CONTEXT_TENSORS} is missing from '{directory}'", _RECOPY)
        header = read_header(path)
    except (CorruptContext, FormatUnsupported, UnsafeContent):
        raise
    except ArtifactError as error:
        # The readers' own words name the file; the type says which kind of artifact it belongs to.
        unsafe = "leaves the directory" in error.message
        raise (UnsafeContent if unsafe else CorruptContext)(error.message, error.remedy) from None
    expected = facts["files"][CONTEXT_TENSORS]
    if header.file_bytes != expected["bytes"]:
        raise CorruptContext(
            f"{CONTEXT_TENSORS}: {header.file_bytes} bytes, {expected['bytes']} were written", _RECOPY
        )
    file = ContextFile(directory, facts, header.tensors, header.file_bytes)
    if verify:
        check_content(file)
    return file


def check_content(file: ContextFile) -> None:
    """Raise `CorruptContext` unless the tensors' bytes are those that were written."""
    if sha256_file(file.path / CONTEXT_TENSORS) != file.facts["files"][CONTEXT_TENSORS]["sha256"]:
        raise CorruptContext(
            f"{CONTEXT_TENSORS}: its bytes are not those that were written (sha256 differs)", _RECOPY
        )


def digest(facts: dict[str, Any]) -> str:
    """sha256 of everything in context.json but the digest itself."""
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_version(facts: dict[str, Any]) -> None:
    version = facts.get("format_version")
    if facts.get("format") != "loadstone-context" or type(version) is not int:
        raise CorruptContext(f"{CONTEXT_JSON} does not describe a fitted context", "Fit the context again")
    kind = facts.get("kind")
    if kind not in KINDS:
        raise FormatUnsupported(
            f"{CONTEXT_JSON}: a context of kind {str(kind)[:40]!a}, this loadstone reads {', '.join(KINDS)}",
            "Update loadstone",
        )
    wanted = FORMAT_VERSIONS[kind]
    if version != wanted:
        raise FormatUnsupported(
            f"{CONTEXT_JSON}: format version {version}, and this loadstone reads version {wanted}",
            "Update loadstone" if version > wanted else "Fit the context again",
        )


def _check_shape(facts: dict[str, Any]) -> None:
    """The keys that code relies on are there, with the right types."""
    for key, kind in (_COMMON_KEYS | _KIND_KEYS[facts["kind"]]).items():
        if not isinstance(facts.get(key), kind):
            raise CorruptContext(f"{CONTEXT_JSON}: '{key}' is missing or malformed", _RECOPY)
    files, base, cache = facts["files"], facts["base"], facts["cache"]
    names = set(files)
    for name in names - {CONTEXT_TENSORS}:
        raise UnsafeContent(
            f"{CONTEXT_JSON} names the file {name[:200]!a}, which does not belong to a context",
            "Do not trust it",
        )
    entry = files.get(CONTEXT_TENSORS)
    if (
        not isinstance(entry, dict)
        or type(entry.get("bytes")) is not int
        or not isinstance(entry.get("sha256"), str)
    ):
        raise CorruptContext(f"{CONTEXT_JSON}: 'files' does not describe {CONTEXT_TENSORS}", _RECOPY)
    tensors = base.get("tensors")
    well_formed = isinstance(tensors, dict) and all(
        isinstance(t, list) and len(t) == 3 and isinstance(t[1], list) for t in tensors.values()
    )
    if (
        not well_formed
        or not isinstance(base.get("architecture"), dict)
        or not isinstance(cache.get("dtype"), str)
    ):
        raise CorruptContext(f"{CONTEXT_JSON}: 'base' or 'cache' is malformed", _RECOPY)


def _refuse_planted(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        if path.name.lower().endswith(_UNSAFE_SUFFIXES):
            raise UnsafeContent(
                f"'{path.name}' is in the context, and a context holds JSON and safetensors only",
                "Do not trust this directory; remove the file if you know where it came from",
            )


_COMMON_KEYS: dict[str, type] = {"base": dict, "cache": dict, "numerics": dict, "files": dict}
_TABLE_KEYS: dict[str, type] = {
    "task": str, "rows": int, "features": int, "schema": dict, "classes": list, "encoder": dict,
    "contains_training_labels": bool,
}  # fmt: skip
_KIND_KEYS: dict[str, dict[str, type]] = {
    PFN: _TABLE_KEYS,
    TABPFN: _TABLE_KEYS | {"packages": dict},
    PREFIX: {"prompt": dict, "tokenizer": dict, "layers": list, "contains_prompt": bool},
}  # fmt: skip
_RECOPY = "Copy the directory again, or fit the context again"

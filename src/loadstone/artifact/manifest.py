"""``loadstone.json``: where an artifact came from and the hash of each file.

Provenance only, never needed to load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from loadstone.artifact.files import check_inside, is_file, read_json
from loadstone.artifact.hashing import sha256_file
from loadstone.errors import ArtifactError

MANIFEST = "loadstone.json"
FORMAT_VERSION = 1
# Names that loaders look for beside or instead of those that are listed.
_LOADED = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "*.py",
    "*.jinja",
    "*config.json",
    "tokenizer*.json",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    ".metadata",
    "context.json",
)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, or None when there is none; raises `ArtifactError` when it is malformed."""
    if not is_file(directory / MANIFEST):
        return None
    return read_json(check_inside(directory, MANIFEST))


def recorded_digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of those of the files ``names`` that loadstone.json records, or whose name in a Hugging Face cache is
    it."""
    found: dict[str, str] = {}
    for name in names:
        target = (directory / name).resolve()
        if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
            found[name] = target.name
    try:
        files = (read_manifest(directory) or {}).get("files")
    except ArtifactError:
        files = None
    recorded = files if isinstance(files, dict) else {}
    return found | {name: str(recorded[name]) for name in names if name in recorded}


def verify_files(directory: Path) -> list[str]:
    """Every disagreement between the manifest's hashes and the files, and every file that a load would read and the
    manifest does not list.

    Raises `ArtifactError` without a manifest.
    """
    manifest = read_manifest(directory)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"'{directory}' has no {MANIFEST} to verify against", "Only finalize writes one")
    problems: list[str] = []
    if not manifest["files"]:
        problems.insert(0, f"{MANIFEST} lists no files: nothing can be verified")
    for name, digest in manifest["files"].items():
        try:
            path = check_inside(directory, name)
        except ArtifactError as error:
            problems.append(error.message)
            continue
        if not is_file(path):
            problems.append(f"{name}: missing")
        elif sha256_file(path) != digest:
            problems.append(f"{name}: content differs from the sha256 in {MANIFEST}")
    problems += [
        f"{ascii(path.name)[1:-1]}: not listed in {MANIFEST}, and a load would read it"
        for path in sorted(directory.iterdir())
        if path.name not in manifest["files"] and any(fnmatch(path.name, p) for p in _LOADED)
    ]
    return problems


def versions() -> dict[str, str]:
    """Versions of everything that decides an artifact's bytes."""
    import platform

    from loadstone._version import __version__

    names = ("torch", "torchao", "transformers", "safetensors")
    return {"loadstone": __version__, "python": platform.python_version()} | {
        name: _version_of(name) for name in names
    }


@cache
def _version_of(name: str) -> str:
    # Reading a package's metadata takes milliseconds, and a finalize asks several times.
    from importlib.metadata import version

    return version(name)

"""``loadstone.json``: where an artifact came from and the hash of each file. Provenance only, never needed to load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    from loadstone.artifact.detect import Artifact

MANIFEST = "loadstone.json"
FORMAT_VERSION = 1


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(artifact: Artifact) -> str:
    """sha256 over config.json and every weight file, by name and content."""
    total = hashlib.sha256()
    for name in ("config.json", *artifact.weights.files):
        total.update(f"{name}\0{sha256_file(artifact.path / name)}\n".encode())
    return total.hexdigest()


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, or None when there is none."""
    file = directory / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{MANIFEST} is not valid JSON", "It is not needed to load: remove or restore it")
    return manifest


def verify_files(directory: Path) -> list[str]:
    """Every disagreement between the manifest's hashes and the files; raises `ArtifactError` without a manifest."""
    manifest = read_manifest(directory)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"'{directory}' has no {MANIFEST} to verify against", "Only finalize writes one")
    problems = []
    for name, digest in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256_file(path) != digest:
            problems.append(f"{name}: content differs from the sha256 in {MANIFEST}")
    return problems

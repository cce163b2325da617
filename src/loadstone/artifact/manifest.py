"""``loadstone.json``: where an artifact came from and the hash of each file.

Provenance only, never needed to load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.files import check_inside, is_file, read_json
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    from loadstone.artifact.detect import Artifact

MANIFEST = "loadstone.json"
FORMAT_VERSION = 1


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(artifact: Artifact) -> str:
    """sha256 over config.json and every weight file, by name and content."""
    import hashlib

    total = hashlib.sha256()
    files = [artifact.config_dir / "config.json", *(artifact.path / f for f in artifact.weights.files)]
    if artifact.dcp is not None:
        files += [artifact.path / f for f in artifact.dcp.files]
    for path in files:
        name = path.relative_to(artifact.path) if path.is_relative_to(artifact.path) else path.name
        total.update(f"{name}\0{sha256_file(path)}\n".encode())
    return total.hexdigest()


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, or None when there is none; raises `ArtifactError` when it is malformed."""
    if not is_file(directory / MANIFEST):
        return None
    return read_json(check_inside(directory, MANIFEST))


def verify_files(directory: Path) -> list[str]:
    """Every disagreement between the manifest's hashes and the files.

    Raises `ArtifactError` without a manifest.
    """
    manifest = read_manifest(directory)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"'{directory}' has no {MANIFEST} to verify against", "Only finalize writes one")
    problems = []
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
    return problems

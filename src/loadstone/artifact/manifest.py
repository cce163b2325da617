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
QUANTIZER_FILES = ("fakequant_manifest.json", "fakequant_state.safetensors")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    import hashlib

    # Larger bites than hashlib.file_digest takes: each one waits for the interpreter's lock twice.
    total, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(buffer[:count])
    return total.hexdigest()


def fingerprint(artifact: Artifact) -> str:
    """sha256 over config.json, every weight file and a fake-quant export's quantizers, by name and content."""
    import hashlib
    import os
    from concurrent.futures import ThreadPoolExecutor

    total = hashlib.sha256()
    files = [artifact.config_dir / "config.json", *(artifact.path / f for f in artifact.weights.files)]
    if artifact.dcp is not None:
        files += [artifact.path / f for f in artifact.dcp.files]
    # Quantizers of inputs change what is computed with the same weights.
    files += [artifact.path / f for f in QUANTIZER_FILES if is_file(artifact.path / f)]
    # Half the cores: the others are at work on the same files.
    with ThreadPoolExecutor(min(max((os.cpu_count() or 1) // 2, 1), 8)) as pool:
        for path, digest in zip(files, pool.map(sha256_file, files), strict=True):
            name = path.relative_to(artifact.path) if path.is_relative_to(artifact.path) else path.name
            total.update(f"{name}\0{digest}\n".encode())
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


def versions() -> dict[str, str]:
    """Versions of everything that decides an artifact's bytes."""
    import platform
    from importlib.metadata import version

    from loadstone._version import __version__

    names = ("torch", "torchao", "transformers", "safetensors")
    return {"loadstone": __version__, "python": platform.python_version()} | {
        name: version(name) for name in names
    }

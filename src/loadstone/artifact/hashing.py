"""The sha256 of a file."""

from __future__ import annotations

from pathlib import Path

from loadstone.artifact.files import open_regular


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes; raises `ArtifactError` for what is no regular file."""
    import hashlib

    # Larger blocks than hashlib.file_digest reads: each of them waits for the interpreter's lock twice.
    total, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open_regular(path, buffering=0) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            total.update(buffer[:count])
    return total.hexdigest()

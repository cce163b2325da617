"""The sha256 of a file."""

from __future__ import annotations

from pathlib import Path


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    import hashlib

    # Larger blocks than hashlib.file_digest reads: each of them waits for the interpreter's lock twice.
    total, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(buffer[:count])
    return total.hexdigest()

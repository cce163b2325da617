"""A scan for NaN and infinity over tensors on disk, in bounded memory, beside the load itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy

    from loadstone.artifact import TensorInfo

_CHUNK = 1 << 20

# (view dtype, mask, value): an element is NaN or infinite exactly when (element & mask) == value.
_PATTERNS = {
    "BF16": ("uint16", 0x7F80, 0x7F80),
    "F16": ("uint16", 0x7C00, 0x7C00),
    "F32": ("uint32", 0x7F800000, 0x7F800000),
    "F64": ("uint64", 0x7FF0000000000000, 0x7FF0000000000000),
    "F8_E4M3": ("uint8", 0x7F, 0x7F),
    "F8_E5M2": ("uint8", 0x7C, 0x7C),
    "F8_E8M0": ("uint8", 0xFF, 0xFF),
}


def check_finite(directory: Path, tensors: list[TensorInfo]) -> None:
    """Raise `ArtifactError` naming the first stored tensor that holds a NaN or an infinity.

    Reads through a 1 MiB buffer: resident memory does not grow with the model, unlike a scan of mapped tensors.
    """
    import numpy

    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    raw = numpy.frombuffer(buffer, dtype=numpy.uint8)
    by_file: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        if tensor.dtype in _PATTERNS:
            by_file.setdefault(tensor.file, []).append(tensor)
    for file, entries in by_file.items():
        descriptor = os.open(directory / file, os.O_RDONLY)
        try:
            for tensor in sorted(entries, key=lambda t: t.begin):
                for position in range(tensor.begin, tensor.end, _CHUNK):
                    count = os.preadv(descriptor, [view[: min(_CHUNK, tensor.end - position)]], position)
                    if count < min(_CHUNK, tensor.end - position):
                        raise ArtifactError(f"{file}: truncated inside tensor '{tensor.name}'", "Copy the file again")
                    if _has_non_finite(raw[:count], tensor.dtype):
                        raise ArtifactError(
                            f"{file}: tensor '{tensor.name}' holds NaN or infinity",
                            "The file is damaged or the training diverged: copy it again or use another checkpoint",
                        )
        finally:
            os.close(descriptor)


def _has_non_finite(raw: numpy.ndarray, dtype: str) -> bool:
    # numpy and not torch: one thread beside the load, which keeps torch's threads for itself.
    name, mask, value = _PATTERNS[dtype]
    bits = raw.view(name)
    bits &= bits.dtype.type(mask)
    return bool(bits.max() == value)

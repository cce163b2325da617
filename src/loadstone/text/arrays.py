"""Named arrays and JSON facts in one file, replaced atomically so that processes may share the directory."""

from __future__ import annotations

import hashlib
import json
import logging
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.writing.filesystem import make_folder, replacing

log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


def write_arrays(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    """Write a file, or replace it. Raises OSError; nothing half-written stays."""
    make_folder(path.parent)
    about = {"name": path.name, "sha256": _checksum(arrays, facts), "facts": facts}
    packed: dict[str, Any] = {
        "__facts__": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        **arrays,
    }
    with replacing(path) as file:
        np.savez(file, **packed)


def read_arrays(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Read the arrays and facts of `write_arrays`; None if the file is absent.

    None too, with one warning, for what is damaged, was written under another name (a copy of another entry), or is
    no regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("not a regular file")
        with zipfile.ZipFile(path) as archive:
            # `write_arrays` compresses nothing, so that arrays are never larger than the file.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed")
        with np.load(path, allow_pickle=False) as packed:
            arrays = {name: packed[name] for name in packed.files}
        about = json.loads(arrays.pop("__facts__").tobytes())
        facts: dict[str, Any] = about["facts"]
        if about["name"] != path.name or about["sha256"] != _checksum(arrays, facts):
            raise ValueError("not the entry of this name")
        return arrays, facts
    except FileNotFoundError:
        return None
    # Damage shows as errors of many kinds, in zipfile, numpy and json.
    except Exception as error:
        log.warning("%s is damaged (%s): computing it again", path, " ".join(str(error).split())[:100])
        return None


def _checksum(arrays: Arrays, facts: dict[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, values in sorted(arrays.items()):
        total.update(f"{name}\0{values.dtype.str}{values.shape}\0".encode())
        # A view of the bytes: an array may take half of the memory.
        total.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return total.hexdigest()

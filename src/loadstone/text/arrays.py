"""Named arrays and JSON facts in one file, replaced atomically so that processes may share the directory."""

from __future__ import annotations

import json
import logging
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


def write_arrays(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    """Write a file, or replace it. Raises OSError; nothing half-written stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            packed: dict[str, Any] = {
                "__facts__": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
                **arrays,
            }
            np.savez(file, **packed)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_arrays(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Read the arrays and facts of `write_arrays`; None if the file is absent, or damaged by its checksums."""
    try:
        with np.load(path, allow_pickle=False) as packed:
            arrays = {name: packed[name] for name in packed.files}
        facts: dict[str, Any] = json.loads(arrays.pop("__facts__").tobytes())
        return arrays, facts
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        log.warning("%s is damaged: computing it again", path)
        return None

"""Token ids cached on disk, keyed by the hashes of the text and of the tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loadstone.text.arrays import Arrays, read_arrays, write_arrays
from loadstone.writing.filesystem import open_locked

log = logging.getLogger(__name__)
# In bytes. Tokenizing less text than this is not worth a file.
SMALLEST_TEXT = 4 << 20
_KEPT_DAYS = 30


def cached_ids(
    directory: Path, text_sha256: str, tokenizer_sha256: str, make: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
    """Token ids of each document, int64 (tokens,): read from ``directory``, or computed by ``make`` and stored there.

    Processes may share the directory: one tokenizes while the others wait. A directory that cannot be
    written is not an error.
    """
    import tokenizers

    # The library's version is part of the key: a fix in it may change tokens.
    facts = [text_sha256, tokenizer_sha256, tokenizers.__version__]
    path = directory / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.npz"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            found = read_arrays(path)
            if found is not None and _fits(found[0]):
                path.touch()
                log.info("tokens found in %s", directory)
                ids, lengths = found[0]["ids"], found[0]["lengths"]
                return np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])
            made = make()
            packed: Arrays = {
                "ids": np.concatenate(made).astype(np.int32),
                "lengths": np.array([len(m) for m in made], dtype=np.int64),
            }
            _prune(directory)
            write_arrays(path, packed, {})
            return made
    except OSError as error:
        log.debug("tokens are not cached in %s: %s", directory, error.strerror)
        return make()


def _fits(arrays: Arrays) -> bool:
    """Whether these are ids and lengths that belong together."""
    ids, lengths = arrays.get("ids"), arrays.get("lengths")
    if ids is None or lengths is None or ids.ndim != 1 or lengths.ndim != 1:
        return False
    integers = ids.dtype == np.int32 and lengths.dtype == np.int64
    return bool(integers and (lengths >= 0).all() and lengths.sum() == len(ids))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file next to ``path``; without locks (NFS, FUSE) each process tokenizes for itself."""
    name = path.with_suffix(".lock")
    descriptor = open_locked(name, wait=True)
    try:
        yield
    finally:
        # Removed while held: whoever waits for it sees that it is gone.
        name.unlink(missing_ok=True)
        os.close(descriptor)


def _prune(directory: Path) -> None:
    """Remove entries unused for a month, and files left by killed processes."""
    for path in directory.iterdir():
        if (
            path.suffix in (".npz", ".partial", ".tmp", ".lock")
            and time.time() - path.stat().st_mtime > _KEPT_DAYS * 86400
        ):
            path.unlink(missing_ok=True)

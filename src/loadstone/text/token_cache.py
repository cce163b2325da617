"""Token ids cached on disk, keyed by the hashes of the text and of the tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loadstone.artifact.files import open_regular
from loadstone.artifact.hashing import sha256_file
from loadstone.text.arrays import Arrays, read_arrays, write_arrays
from loadstone.text.stream import Tokens
from loadstone.writing.filesystem import make_folder, open_locked, replacing

log = logging.getLogger(__name__)
# In bytes. Tokenizing less text than this is not worth a file.
SMALLEST_TEXT = 4 << 20
_KEPT_DAYS = 30
# Of an entry: token ids, int32, beside the counts of its documents.
_IDS = ".tokens"
_FORMAT = 2
# What is counted of each document: the tokens of its prompt and its own, UTF-8 bytes and words.
COUNTS = ("prompts", "texts", "bytes", "words")
Counts = dict[str, np.ndarray]
Put = Callable[[np.ndarray], None]


def cached_tokens(
    directory: Path, text_sha256: str, tokenizer_sha256: str, make: Callable[[Put], Counts]
) -> Tokens:
    """The tokens of a text: mapped from a file in ``directory``, or given by ``make`` to what it is called with and
    stored there.

    Processes may share the directory: one tokenizes while the others wait. A directory that cannot be
    written is not an error.
    """
    import tokenizers

    # The library's version is part of the key: a fix in it may change tokens.
    facts = [_FORMAT, text_sha256, tokenizer_sha256, tokenizers.__version__]
    path = directory / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.npz"
    try:
        make_folder(directory)
        with _alone(path):
            if (found := _read(path)) is not None:
                log.info("tokens found in %s", directory)
                return found
            _prune(directory)
            return _write(path, make)
    except OSError as error:
        log.debug("tokens are not cached in %s: %s", directory, error.strerror)
        return tokens_in_memory(make)


def tokens_in_memory(make: Callable[[Put], Counts]) -> Tokens:
    """The tokens that ``make`` gives."""
    parts = [np.empty(0, dtype=np.int32)]
    counts = make(parts.append)
    return _with_counts(np.concatenate(parts), counts)


def _write(path: Path, make: Callable[[Put], Counts]) -> Tokens:
    ids = path.with_suffix(_IDS)
    digest = hashlib.sha256()

    def put(some: np.ndarray) -> None:
        data = some.astype("<i4", copy=False).tobytes()
        digest.update(data)
        file.write(data)

    with replacing(ids) as file:
        counts = make(put)
    write_arrays(path, counts, {"ids": digest.hexdigest()})
    return _mapped(ids, counts)


def _read(path: Path) -> Tokens | None:
    """An entry of the cache; None if it is absent, and with a warning if it is damaged."""
    ids = path.with_suffix(_IDS)
    found = read_arrays(path)
    if found is None or not ids.is_file():
        return None
    counts, facts = found
    whole = sha256_file(ids) == facts.get("ids")
    if not whole or not _fits(counts, ids.stat().st_size):
        log.warning("%s is damaged: tokenizing again", ids)
        return None
    for entry in (path, ids):
        os.utime(entry, follow_symlinks=False)
    return _mapped(ids, counts)


def _mapped(path: Path, counts: Counts) -> Tokens:
    with open_regular(path) as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None
    ids = np.frombuffer(mapping or b"", dtype="<i4")
    return _with_counts(ids, counts, mapping)


def _with_counts(ids: np.ndarray, counts: Counts, mapping: mmap.mmap | None = None) -> Tokens:
    prompts, texts, nbytes, words = (counts[name] for name in COUNTS)
    return Tokens(ids, prompts, texts, nbytes, words, mapping)


def _fits(counts: Arrays, size: int) -> bool:
    """Whether these are counts of documents whose ids take ``size`` bytes."""
    whole = all(a.ndim == 1 and a.dtype == np.int64 and (a >= 0).all() for a in counts.values())
    if not whole or counts.keys() != set(COUNTS) or len({len(a) for a in counts.values()}) != 1:
        return False
    return bool(4 * (counts["prompts"].sum() + counts["texts"].sum()) == size)


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
            path.suffix in (".npz", _IDS, ".partial", ".tmp", ".lock")
            and time.time() - path.stat().st_mtime > _KEPT_DAYS * 86400
        ):
            path.unlink(missing_ok=True)

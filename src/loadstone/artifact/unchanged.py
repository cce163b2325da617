"""Directories that are replaced, and files that are written, while they are read: two states are never mixed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from loadstone.artifact.files import naming
from loadstone.errors import ArtifactError, LoadstoneError

# Name, bytes and time of the last change (nanoseconds) of files, by which a change is noticed.
Stamp = tuple[tuple[str, int, int], ...]
T = TypeVar("T")
# A model that takes this often as long to read as its writer takes to replace it is not waited for.
_TRIES = 10


class Changed(ArtifactError):
    """What was read is not what was looked at before."""


def stamp_of(directory: Path, names: Iterable[str], *, absolute: bool = False) -> Stamp:
    """The stamp of a directory's files; those that are not there are left out. ``absolute``: with their whole paths."""
    found = []
    for name in names:
        try:
            status = (directory / name).stat()
        except (OSError, ValueError):
            continue
        found.append((str(directory / name) if absolute else name, status.st_size, status.st_mtime_ns))
    return tuple(found)


def check_unchanged(directory: Path, before: Stamp) -> None:
    """Raise `Changed` when files have another stamp than ``before``."""
    for name, size, changed in before:
        try:
            status = (directory / name).stat()
        except FileNotFoundError:
            status = None
        if status is None or (status.st_size, status.st_mtime_ns) != (size, changed):
            raise Changed(f"'{directory / name}' changed while it was read", "Run again")


def read_at_once(directory: Path, read: Callable[[], T]) -> T:
    """What ``read`` returns, called again while the directory is replaced by another in the meantime, or it raises
    `Changed`; what changes each time is an error."""
    for left in reversed(range(_TRIES)):
        try:
            with _held(directory):
                return read()
        except Changed:
            if not left:
                raise
    raise AssertionError("unreachable")


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Raise `Changed` when ``directory`` names another directory at the end of the block than at its beginning."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, ValueError):
        # Not a directory: what reads it says so.
        yield
        return
    try:
        # Open, so that no other directory is given its number.
        with naming(directory):
            before = os.fstat(descriptor)
        try:
            yield
        except (LoadstoneError, OSError) as error:
            if isinstance(error, Changed) or _is_same(directory, before):
                raise
            raise Changed(f"'{directory}' was replaced while it was read", "Run again") from error
        if not _is_same(directory, before):
            raise Changed(f"'{directory}' was replaced while it was read", "Run again")
    finally:
        os.close(descriptor)


def _is_same(directory: Path, before: os.stat_result) -> bool:
    try:
        return os.path.samestat(directory.stat(), before)
    except OSError:
        return False

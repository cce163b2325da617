"""An output directory that appears whole or not at all: checks and a lock before the work, one rename at its end."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loadstone.errors import MissingError, UsageError

# Room for config, tokenizer and index beside the weights.
_SPARE_BYTES = 64 * 2**20


def check_output(source: Path | None, out: Path, overwrite: bool) -> None:
    """Refuse an existing output, and one that is or lies inside the source (or the other way round)."""
    if out.name in ("", ".."):
        raise UsageError(f"the output '{out}' has no name of its own", "Name a directory to be made")
    target = out.resolve()
    if source is not None:
        root = source.resolve()
        if target == root or target.is_relative_to(root) or root.is_relative_to(target):
            raise UsageError(f"the output '{out}' and the source '{source}' overlap", "Choose another output")
    if not can_write(out):
        raise UsageError(f"cannot write '{out}'", "Choose another output, or change its folder's permissions")
    exists = out.exists() or out.is_symlink()
    if exists and not overwrite:
        raise UsageError(f"the output '{out}' exists", "Choose another, or pass --overwrite to replace it")
    if exists and not out.is_dir():
        raise UsageError(f"the output '{out}' is no directory", "Choose another")


def can_write(path: Path) -> bool:
    """Whether a file or directory can be made at ``path``, with the folders before it."""
    try:
        parent = _existing_parent(path)
        return parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    except PermissionError:
        return False


def check_space(nbytes: int, out: Path, *work: Path) -> None:
    """Raise `MissingError` when the disk cannot hold an output with ``nbytes`` of weights; what lies in the folders
    ``work`` already counts as free."""
    parent = _existing_parent(out)
    held = sum(p.stat().st_blocks * 512 for folder in work if folder.exists() for p in folder.iterdir())
    free = shutil.disk_usage(parent).free + held
    need = nbytes + _SPARE_BYTES
    if free < need:
        raise MissingError(
            f"'{parent}' has {free / 1e9:.2f} GB free and the output needs {need / 1e9:.2f} GB",
            "Free some space, or choose another output",
        )


def publish(work: Path, out: Path, overwrite: bool) -> None:
    """Make the output appear in one rename; what it replaces is set aside first and removed after.

    Of a link to a directory only the link is replaced.
    """
    if out.exists() and overwrite:
        old = out.with_name(f".{out.name}.replaced")
        _remove(old)
        out.rename(old)
        try:
            work.rename(out)
        except BaseException:
            old.rename(out)
            raise
        _remove(old)
    else:
        work.rename(out)
    directory = os.open(out.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the output's lock for a block; raises `UsageError` when another process has it."""
    path = out.with_name(f".{out.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"another process is writing '{out}'", "Wait for it, or choose another output"
            ) from None
        # The holder before may have removed the file between the two calls: then the lock is on nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        # Removed while held: whoever opened it in between sees that it is gone.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _existing_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent

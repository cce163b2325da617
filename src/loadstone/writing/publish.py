"""An output directory that appears whole or not at all: checks and a lock before the work, one rename at its end.

Beside ``OUT`` lie, while it is written, ``.OUT.lock``, the work (``.OUT.partial`` where a later run can resume it, else
``.OUT.writing``), and for the moment of a replacement ``.OUT.replaced``. A name that holds anything else is refused.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loadstone.artifact.context_file import CONTEXT_JSON
from loadstone.artifact.detect import CONFIG
from loadstone.artifact.files import resolved
from loadstone.artifact.manifest import MANIFEST
from loadstone.errors import LoadstoneError, MissingError, UsageError
from loadstone.writing.filesystem import (
    everything_in,
    exchange,
    explain,
    is_plain,
    open_locked,
    sync_directory,
    sync_tree,
    uninterrupted,
)

log = logging.getLogger(__name__)

# Room for config, tokenizer and index beside the weights.
_SPARE_BYTES = 64 * 2**20
LOCK, PARTIAL, WRITING, REPLACED, CALIBRATED = "lock", "partial", "writing", "replaced", "calibrated"
# The directory in each of the others that is, was or becomes the output; in `.OUT.writing` and `.OUT.replaced` the one
# entry, by which they are recognised as ours.
ENTRY = "output"


def working_path(out: Path, ending: str) -> Path:
    """A hidden sibling of ``out``, on its file system: renaming it is one step."""
    return out.with_name(f".{out.name}.{ending}")


def check_output(source: Path | None, out: Path, overwrite: bool) -> None:
    """Raise `UsageError` for an output that exists, overlaps its source, cannot be written, or whose working names are
    taken by something else."""
    if out.name in ("", ".."):
        raise UsageError(f"the output '{out}' has no name of its own", "Name a directory to be made")
    _check_length(out)
    target = resolved(out)
    if source is not None:
        root = resolved(source)
        if target == root or target.is_relative_to(root) or root.is_relative_to(target):
            raise UsageError(f"the output '{out}' and the source '{source}' overlap", "Choose another output")
    if not can_write(out):
        raise UsageError(f"cannot write '{out}'", "Choose another output, or change its folder's permissions")
    exists = _exists(out)
    if exists and not overwrite:
        # A run that was killed at its very end may have left something beside it.
        with suppress(LoadstoneError, OSError), _lock_file(out):
            _clear_after_kill(out)
        raise UsageError(
            f"the output '{out}' exists", "Choose another, or pass --overwrite (overwrite=True) to replace it"
        )
    if exists and not out.is_dir():
        raise UsageError(f"the output '{out}' is no directory", "Choose another")
    if exists and not _replaceable(out):
        raise UsageError(
            f"the output '{out}' holds files, and no model among them: it will not be replaced",
            "Choose another, or remove it yourself",
        )
    _check_working_names(out)


def _replaceable(out: Path) -> bool:
    """Whether a directory is empty, or a model or a context: not a folder of several, or of something else. Of a link
    nothing is lost."""
    names = [] if out.is_symlink() else [entry.name for entry in out.iterdir()]
    known = (CONFIG, MANIFEST, CONTEXT_JSON)
    return not names or any(name in known or name.endswith((".safetensors", ".bin")) for name in names)


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


@contextmanager
def new_directory(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty directory to fill, which becomes ``out`` when the ``with`` block ends, or is removed when it raises.

    Raises `UsageError` when ``out`` cannot be made or another process is writing it, `MissingError` for disk errors.
    """
    with locked(out, overwrite):
        work = working_path(out, WRITING) / ENTRY
        work.mkdir(parents=True)
        yield work
        publish(work, out, overwrite)


def publish(work: Path, out: Path, overwrite: bool) -> None:
    """Make the output appear in one step, within `locked`, which removes what is left. With ``overwrite`` an earlier
    output is swapped against it; of a link to a directory only the link is replaced.

    Where the file system cannot swap two names the earlier output is set aside first; `locked` puts it back when the
    run is killed in between.
    """
    if not overwrite and _exists(out):
        raise UsageError(f"the output '{out}' appeared while it was made", "Choose another output")
    sync_tree(work)
    with uninterrupted():
        if not _exists(out):
            work.rename(out)
        else:
            aside = working_path(out, REPLACED)
            aside.mkdir()
            # Under this name a kill leaves what is safe to remove, be it the new output or the earlier one.
            work.rename(aside / ENTRY)
            if not exchange(aside / ENTRY, out):
                (aside / ENTRY).rename(work)
                out.rename(aside / ENTRY)
                work.rename(out)
        sync_directory(out.parent)


def _clear(out: Path) -> str:
    """Restore or remove what a run left of ``out`` when it ended; returns what was done, empty for nothing."""
    aside, written = working_path(out, REPLACED), working_path(out, WRITING)
    done = ""
    try:
        if aside.is_dir():
            done = "what was left of it is removed"
            if not _exists(out):
                entry = aside / ENTRY if _exists(aside / ENTRY) else aside
                entry.rename(out)
                done = "the output is put back"
            if (aside / ENTRY).is_symlink():
                (aside / ENTRY).unlink()
            if aside.exists():
                shutil.rmtree(aside)
    finally:
        if written.is_dir():
            shutil.rmtree(written)
            done = done or f"'{written}' is removed"
        with suppress(OSError):
            # Empty where its output was published, or not begun.
            working_path(out, PARTIAL).rmdir()
    return done


def _clear_after_kill(out: Path) -> None:
    _check_working_names(out)
    if done := _clear(out):
        log.warning("a run was killed while it wrote '%s': %s", out, done)


@contextmanager
def locked(out: Path, overwrite: bool = False) -> Iterator[None]:
    """Hold the output's lock for a block, in which ``out`` may be written; folders before it are made.

    What a run that was killed left is restored or removed first, and what the block leaves when it ends. Raises
    `UsageError` when another process has the lock or `check_output` refuses the output, and `MissingError` for disk
    errors in the block.
    """
    try:
        with _lock_file(out):
            _clear_after_kill(out)
            check_output(None, out, overwrite)
            try:
                yield
            finally:
                with uninterrupted():
                    _clear(out)
    except OSError as error:
        if (refusal := explain(error, f"'{out}' could not be written")) is None:
            raise
        raise refusal from error


@contextmanager
def _lock_file(out: Path) -> Iterator[None]:
    """Hold ``.OUT.lock``. It is removed with the block, as are the folders made for it if they are empty."""
    path = working_path(out, LOCK)
    missing = [folder for folder in path.parents if not folder.exists()]
    descriptor = -1
    try:
        with uninterrupted():
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                sync_directory(folder.parent)
            descriptor = _open_lock(path, out)
        yield
    finally:
        with uninterrupted():
            try:
                if descriptor >= 0:
                    # Removed while held: whoever opened it in between sees that it is gone.
                    path.unlink(missing_ok=True)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
                with suppress(OSError):
                    for folder in missing:
                        folder.rmdir()


def _open_lock(path: Path, out: Path) -> int:
    try:
        descriptor = open_locked(path)
    except FileExistsError:
        raise name_taken(path, out) from None
    except BlockingIOError:
        raise UsageError(
            f"another process is writing '{out}'", "Wait for it, or choose another output"
        ) from None
    if os.fstat(descriptor).st_size:
        os.close(descriptor)
        raise name_taken(path, out)
    return descriptor


def _check_working_names(out: Path) -> None:
    """Raise `UsageError`, with its name, for what lies at a working name and is not of loadstone's making."""
    for ending in (LOCK, PARTIAL, WRITING, REPLACED, CALIBRATED):
        path = working_path(out, ending)
        # Gone: another process has just ended.
        with suppress(FileNotFoundError, NotADirectoryError):
            if (strange := _foreign(path, ending)) is not None:
                raise name_taken(strange, out)


def _foreign(path: Path, ending: str) -> Path | None:
    """A working name, or one within it, that holds what is not of loadstone's making; None where all is."""
    found = path.lstat()
    if ending == LOCK:
        return None if stat.S_ISREG(found.st_mode) and not found.st_size else path
    if not stat.S_ISDIR(found.st_mode) or not _is_ours(path, ending):
        return path
    if ending not in (PARTIAL, CALIBRATED):
        return None
    for each in everything_in(path):
        # A later run goes on writing there, and would follow a link. Calibrations hold files alone.
        if not is_plain(each) or (ending == CALIBRATED and each.parent != path and each.is_dir()):
            return each
    return None


def _is_ours(path: Path, ending: str) -> bool:
    if ending == PARTIAL:
        # Its journal says (finalization/journal.py).
        return True
    names = {entry.name for entry in path.iterdir()}
    if ending == CALIBRATED:
        return all(re.fullmatch("[0-9a-f]{16}", name) and (path / name).is_dir() for name in names)
    # A bare artifact or context: earlier versions set an output aside by itself.
    if ending == REPLACED and names & {MANIFEST, CONTEXT_JSON, "config.json"}:
        return True
    if names != {ENTRY}:
        return not names
    entry = path / ENTRY
    # What was replaced may have been a link to a directory.
    return stat.S_ISDIR(entry.lstat().st_mode) or (ending == REPLACED and entry.is_symlink())


def name_taken(path: Path, out: Path) -> UsageError:
    """The error for something at the working name ``path`` that loadstone did not put there."""
    return UsageError(
        f"'{path}' was not made by loadstone, and writing '{out.name}' needs that name",
        "Move it away, or choose another output",
    )


def _check_length(out: Path) -> None:
    try:
        working_path(out, REPLACED).lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"the name of the output '{out}' is too long", "Choose a shorter one") from None


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _existing_parent(path: Path) -> Path:
    parent = resolved(path).parent
    while not parent.exists():
        parent = parent.parent
    return parent

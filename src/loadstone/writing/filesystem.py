"""Files that appear whole, lock files, and calls that some file systems lack, each with a fallback."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from loadstone.artifact.files import naming, resolved
from loadstone.errors import LoadstoneError, MissingError, UsageError

log = logging.getLogger(__name__)

# What a kernel or file system answers to a call that it does not have.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_warned: set[int] = set()


def exchange(one: Path, other: Path) -> bool:
    """Swap two names of one file system in a single step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    # EPERM: container runtimes refuse system calls that they do not know.
    if code in _UNSUPPORTED or code == errno.EPERM:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGTERM and Ctrl-C wait until the block ends, so that they cut no clean-up short."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if threading.current_thread() is not threading.main_thread() or None in handlers.values():
        # Python runs handlers in the main thread only; None: one that Python cannot set again.
        yield
        return
    waiting: list[int] = []
    for number in handlers:
        signal.signal(number, lambda arrived, frame: waiting.append(arrived))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for first in waiting[:1]:
            signal.raise_signal(first)


@contextmanager
def replacing(path: Path, *, follow: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of ``path`` when the block ends, and is removed when it raises.

    A link at ``path`` is replaced, or with ``follow``, for paths that a user named, the file that it points to.
    Processes that write the same path do so one after another. Raises `FileExistsError` when something other than a
    file or link is to be replaced (a device, a pipe), or lies at ``.NAME.partial``; a file there was left by a killed
    process, and is written over.
    """
    path = resolved(path) if follow else path
    if path.exists() and not path.is_file() and not path.is_symlink():
        raise FileExistsError(errno.EEXIST, "is not a file", str(path))
    work, descriptor = unfinished(path), -1
    try:
        with uninterrupted(), naming(work):
            descriptor = open_locked(work, wait=True)
        with naming(work):
            os.ftruncate(descriptor, 0)
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                yield file
            sync_file(descriptor, work.parent)
        with uninterrupted():
            work.replace(path)
            os.close(descriptor)
            descriptor = -1
    finally:
        if descriptor >= 0:
            with uninterrupted(), suppress(OSError):
                work.unlink()
            os.close(descriptor)


def unfinished(path: Path) -> Path:
    """Where `replacing` writes ``path``."""
    return path.with_name(f".{path.name}.partial")


def is_plain(path: Path) -> bool:
    """Whether a directory lies at a name, or a file that has no other name."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink <= 1)


def make_folder(path: Path) -> None:
    """Make a folder with those before it, if it is absent; raises OSError for anything else there, a link too."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise FileExistsError(errno.EEXIST, "is a link", str(path))


def open_locked(path: Path, *, wait: bool = False) -> int:
    """Open a regular file, made if absent, and lock it; returns its descriptor.

    Raises `FileExistsError` where something else lies there (links are not followed, and a file with another name is
    somebody's), `BlockingIOError` when another
    process holds the lock, unless told to ``wait`` for it.
    """
    while True:
        try:
            # Not blocking: a named pipe would wait for a reader.
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise FileExistsError(errno.EEXIST, "is not a file", str(path)) from None
            raise
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise FileExistsError(errno.EEXIST, "is not a file", str(path))
            _lock(descriptor, path.parent, wait)
            # The holder before may have removed the file between the two calls: then the lock is on nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_once(folder, "has no file locks: make sure that no other process writes the same output")


def everything_in(folder: Path) -> list[Path]:
    """Every file and directory below ``folder``, sorted; raises OSError, which `Path.rglob` takes for an empty one."""

    def refuse(error: OSError) -> None:
        raise error

    found = [
        Path(root) / name
        for root, folders, files in os.walk(folder, onerror=refuse)
        for name in (*folders, *files)
    ]
    return sorted(found)


def sync_tree(folder: Path) -> None:
    """Have the disk take every file below ``folder`` and the directories' entries."""
    for path in everything_in(folder):
        if path.is_dir():
            sync_directory(path)
        elif path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                sync_file(descriptor, folder)
            finally:
                os.close(descriptor)
    sync_directory(folder)


def sync_file(descriptor: int, folder: Path, sync: Callable[[int], None] = os.fsync) -> None:
    """Have the disk take the bytes of an open file of ``folder``, where its file system can."""
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_once(folder, "cannot sync files: after a power failure an output may be damaged")


def sync_directory(folder: Path) -> None:
    """Have the disk take a directory's entries, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_once(folder, "cannot sync directories: after a power failure an output may be missing")
    finally:
        os.close(descriptor)


def explain(error: OSError, what: str) -> LoadstoneError | None:
    """The error to show a user when the system refused a call on a file, ``what`` first; None for one of another kind,
    such as a network's."""
    if error.errno is None or isinstance(error, ConnectionError):
        return None
    where = f"'{error.filename}': " if isinstance(error.filename, str) else ""
    message = f"{what} ({where}{error.strerror})"
    if error.errno == errno.ENAMETOOLONG:
        return UsageError(message, "Choose a shorter name")
    if error.errno == errno.ELOOP:
        return UsageError(message, "It links to itself: name another path")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MissingError(message, "Free some space and run again")
    return MissingError(message, "Check the disk and its permissions, or choose another place")


def _warn_once(folder: Path, what: str) -> None:
    device = folder.stat().st_dev
    if device not in _warned:
        _warned.add(device)
        log.warning("the file system of '%s' %s", folder, what)

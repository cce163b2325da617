"""Reading files of a directory that is not trusted.

Bounded, regular files only, never outside the directory.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

from loadstone.artifact.hints import LFS_REMEDY, is_lfs_pointer
from loadstone.errors import ArtifactError, LoadstoneError

# Where checks report what they find: `refuse` stops at the first problem, a list's `append` collects all of
# them.
Sink = Callable[[ArtifactError], None]

MAX_CONFIG_BYTES = 16_000_000
MAX_JSON_BYTES = 256_000_000
# Values, keys and brackets in one JSON text: a hundred megabytes of `[[],[],…]` take gigabytes once parsed.
# A hundred thousand tensors, with the descriptions that torchao adds, stay under half of this.
MAX_JSON_ITEMS = 4_000_000
_MAX_DEPTH = 100


# What the system answers about a name at which nothing can be.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}


def refuse(error: ArtifactError) -> NoReturn:
    """The strict sink: raises what it is given."""
    raise error


_FOLLOWING: ContextVar[bool] = ContextVar("following_links", default=False)


@contextmanager
def following_links(follow: bool = True) -> Iterator[None]:
    """Within the block, files of a model directory may be links that leave it, as in a folder of links.

    It holds for this thread. What `detect` returned within the block may be read anywhere, also in other threads.
    """
    token = _FOLLOWING.set(follow)
    try:
        yield
    finally:
        _FOLLOWING.reset(token)


def links_followed() -> bool:
    """Whether this is within `following_links`: what directories and sources take over when they are opened."""
    return _FOLLOWING.get()


def resolved(path: Path) -> Path:
    """`Path.resolve`, which before Python 3.13 raises RuntimeError for a loop of links: here it is OSError."""
    try:
        return path.resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


def check_inside(directory: Path, name: str) -> Path:
    """The path of ``name`` in ``directory``; raises `ArtifactError` when it is, or links, outside.

    A link to another file of the same Hugging Face cache (``blobs/`` beside ``snapshots/``, wherever that is) is
    allowed, and within `following_links` any link.
    """
    parts = PurePosixPath(name).parts
    if (
        not name.isprintable()
        or "\\" in name
        or not parts
        or PurePosixPath(name).is_absolute()
        or ".." in parts
    ):
        raise ArtifactError(f"the file name {name!a} leaves the directory", "Do not trust this artifact")
    path = directory / name
    try:
        root = resolved(directory)
        target = resolved(path)
    except (OSError, ValueError):
        raise ArtifactError(
            f"'{name[:200]}' cannot be followed (a loop of links?)", "Copy the file itself"
        ) from None
    # A checkpoint's folder within a repository links to the same blobs as the repository's own files.
    snapshots = [folder for folder in (root, *root.parents) if folder.parent.name == "snapshots"]
    allowed = [root, *((folder.parent.parent / "blobs").resolve() for folder in snapshots)]
    if not links_followed() and not any(target.is_relative_to(a) for a in allowed):
        raise ArtifactError(
            f"'{name}' is a link that leaves the directory (to {target})",
            "Copy the file itself, or pass --follow-links if you trust the directory",
        )
    return path


def is_file(path: Path) -> bool:
    """Whether a regular file is there; raises `ArtifactError` where that cannot be found out."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except ValueError:
        return False
    except OSError as error:
        # To take any other error for an absent file would leave a file out in silence.
        if error.errno in _ABSENT:
            return False
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})", _PERMISSIONS) from None


def file_size(path: Path, kind: type[LoadstoneError] = ArtifactError) -> int:
    """Bytes of a regular file.

    Raises ``kind`` for anything else: to open a FIFO, a socket or a device could wait or read for ever.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise kind(f"{path.name[:200]}: cannot be read ({reason})", _PERMISSIONS) from None
    return _regular(path, status, kind)


def _regular(path: Path, status: os.stat_result, kind: type[LoadstoneError]) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise kind(f"{path.name}: not a regular file", "Do not trust this directory")
    return status.st_size


def open_regular(path: Path, kind: type[LoadstoneError] = ArtifactError, buffering: int = -1) -> BinaryIO:
    """Open a regular file to read its bytes; every file of a model or of a user's data is opened here.

    Raises ``kind`` as `file_size` does, for files that are exchanged at this moment too.
    """
    # A device must not even be opened, so the path is looked at before; opened without waiting, it may be looked at
    # again.
    file_size(path, kind)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise kind(f"{path.name}: cannot be read ({error.strerror})", _PERMISSIONS) from None
    try:
        with naming(path):
            _regular(path, os.fstat(descriptor), kind)
    except BaseException:
        os.close(descriptor)
        raise
    # The file closes it, also when a signal arrives in between.
    raw = _NamedFile(path, opener=lambda path, flags: descriptor)
    if buffering == 0:
        return raw  # type: ignore[return-value]
    return io.BufferedReader(raw, io.DEFAULT_BUFFER_SIZE if buffering < 0 else buffering)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of calls on an open file, within the block, name its path."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


class _NamedFile(io.FileIO):
    """A file whose errors name it."""

    def readinto(self, buffer: Any) -> int | None:
        with naming(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with naming(self.name):
            return super().readall()


def read_text(path: Path, limit: int = MAX_JSON_BYTES, kind: type[LoadstoneError] = ArtifactError) -> str:
    """The UTF-8 text of a file of at most ``limit`` bytes; raises ``kind`` naming the file."""
    size = file_size(path, kind)
    if size > limit:
        raise kind(f"{path.name}: {size} bytes, over the limit of {limit}", "Check the file")
    with open_regular(path, kind) as file:
        raw = file.read(limit)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise kind(f"{path.name} is not UTF-8 text: byte {error.start}", "Save it as UTF-8") from None


def check_folder(directory: Path) -> None:
    """Raise `ArtifactError` for a FIFO, socket or device in a directory whose files a library opens by itself."""
    try:
        for entry in sorted(os.scandir(directory), key=lambda e: e.name):
            # Where a link points nowhere, there is nothing to open.
            if Path(entry.path).exists() and not entry.is_dir():
                _regular(Path(entry.path), entry.stat(), ArtifactError)
    except OSError as error:
        raise ArtifactError(f"'{directory}' cannot be read ({error.strerror})", _PERMISSIONS) from None


@contextmanager
def translated(
    problem: str, remedy: str = "Copy it again", kind: type[LoadstoneError] = ArtifactError
) -> Iterator[None]:
    """Within the block, errors of a library become ``kind``: the ``problem``, which names the file, and its reason.

    Errors of loadstone, and those of the machine (memory, disk), stay what they are.
    """
    try:
        yield
    except (LoadstoneError, MemoryError):
        raise
    except BaseException as error:
        # What a library in Rust could not foresee is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise kind(f"{problem} ({reason})", remedy) from error


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes; raises `ArtifactError` naming the file."""
    size = file_size(path)
    if size > limit:
        raise ArtifactError(f"{path.name}: {size} bytes, over the limit of {limit}", "Check the directory")
    try:
        with open_regular(path) as file:
            # One more than was there, so that a file which grows meanwhile is not JSON.
            raw = file.read(size + 1)
        if is_lfs_pointer(raw[:32]):
            raise ArtifactError(f"{path.name}: a git-LFS pointer, not the file", LFS_REMEDY)
        content = None if too_many_items(raw) else json.loads(raw)
        if _too_deep(raw, content):
            content = None
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot be read ({error.strerror})", _PERMISSIONS) from None
    except (ValueError, RecursionError, MemoryError):
        content = None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path.name}: not a valid JSON object", "Restore it from the source")
    return content


def _too_deep(raw: bytes, content: Any) -> bool:
    """Whether JSON is nested deeper than `_MAX_DEPTH`: more than Python's own copies and encoders follow."""
    if raw.count(b"[") + raw.count(b"{") <= _MAX_DEPTH:
        return False
    level = [content]
    for _ in range(_MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
    return bool(level)


def too_many_items(raw: bytes | str, most: int = MAX_JSON_ITEMS) -> bool:
    """Whether a JSON text would take too much memory to parse; counts without parsing it."""
    if isinstance(raw, str):
        return raw.count(",") + raw.count("{") + raw.count("[") > most
    return raw.count(b",") + raw.count(b"{") + raw.count(b"[") > most


_PERMISSIONS = "Check the file and its permissions"
_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})

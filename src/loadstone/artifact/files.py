"""Reading files of a directory that is not trusted.

Bounded, regular files only, never outside the directory.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from loadstone.artifact.hints import LFS_REMEDY, is_lfs_pointer
from loadstone.errors import ArtifactError

# Where checks report what they find: `refuse` stops at the first problem, a list's `append` collects all of
# them.
Sink = Callable[[ArtifactError], None]

MAX_CONFIG_BYTES = 16_000_000
MAX_JSON_BYTES = 256_000_000
# Values, keys and brackets in one JSON text: a hundred megabytes of `[[],[],…]` take gigabytes once parsed.
# A hundred thousand tensors, with the descriptions that torchao adds, stay under half of this.
MAX_JSON_ITEMS = 4_000_000


def refuse(error: ArtifactError) -> NoReturn:
    """The strict sink: raises what it is given."""
    raise error


_FOLLOWING: ContextVar[bool] = ContextVar("following_links", default=False)


@contextmanager
def following_links(follow: bool = True) -> Iterator[None]:
    """Within the block, files of a model directory may be links that leave it, as in a folder of links."""
    token = _FOLLOWING.set(follow)
    try:
        yield
    finally:
        _FOLLOWING.reset(token)


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
        root = directory.resolve()
        target = path.resolve()
    except (OSError, ValueError, RuntimeError):
        raise ArtifactError(
            f"'{name[:200]}' cannot be followed (a loop of links?)", "Copy the file itself"
        ) from None
    # A checkpoint's folder within a repository links to the same blobs as the repository's own files.
    snapshots = [folder for folder in (root, *root.parents) if folder.parent.name == "snapshots"]
    allowed = [root, *((folder.parent.parent / "blobs").resolve() for folder in snapshots)]
    if not _FOLLOWING.get() and not any(target.is_relative_to(a) for a in allowed):
        raise ArtifactError(
            f"'{name}' is a link that leaves the directory (to {target})",
            "Copy the file itself, or pass --follow-links if you trust the directory",
        )
    return path


def is_file(path: Path) -> bool:
    """Whether a regular file is there; False too for what the system refuses to look up."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def file_size(path: Path) -> int:
    """Bytes of a regular file; raises `ArtifactError` for what could block or never end (FIFO, device)."""
    try:
        status = path.stat()
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot be read ({error.strerror})", _PERMISSIONS) from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path.name}: not a regular file", "Do not trust this artifact")
    return status.st_size


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes; raises `ArtifactError` naming the file."""
    size = file_size(path)
    if size > limit:
        raise ArtifactError(f"{path.name}: {size} bytes, over the limit of {limit}", "Check the directory")
    try:
        raw = path.read_bytes()
        if is_lfs_pointer(raw[:32]):
            raise ArtifactError(f"{path.name}: a git-LFS pointer, not the file", LFS_REMEDY)
        content = None if too_many_items(raw) else json.loads(raw)
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot be read ({error.strerror})", _PERMISSIONS) from None
    except (ValueError, RecursionError, MemoryError):
        content = None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path.name}: not a valid JSON object", "Restore it from the source")
    return content


def too_many_items(raw: bytes) -> bool:
    """Whether a JSON text would take too much memory to parse; counts without parsing it."""
    return raw.count(b",") + raw.count(b"{") + raw.count(b"[") > MAX_JSON_ITEMS


_PERMISSIONS = "Check the file and its permissions"

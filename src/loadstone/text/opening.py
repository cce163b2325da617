"""Text files opened for reading: compressed or not, as a stream, and never anything but a regular file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from loadstone.artifact.files import open_regular
from loadstone.errors import UsageError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Characters of one document, or of one line of JSON or CSV: more is a damaged or hostile file.
MOST_CHARACTERS = 1 << 28


def inner_suffix(path: Path) -> str:
    """The suffix that says what a file holds: ``.jsonl`` of ``a.jsonl.gz``."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file, read as they are asked for.

    Raises `UsageError` for a damaged compressed file.
    """
    suffix = path.suffix.lower()
    with open_regular(path, UsageError) as raw:
        try:
            if suffix == ".gz":
                handle: Any = gzip.GzipFile(fileobj=raw)
            elif suffix == ".bz2":
                handle = bz2.BZ2File(raw)
            elif suffix == ".xz":
                handle = lzma.LZMAFile(raw, format=lzma.FORMAT_XZ)  # noqa: SIM115
            elif suffix == ".zst":
                # Python has zstd from 3.14 on; datasets needs pyarrow anyway.
                import pyarrow

                handle = pyarrow.CompressedInputStream(raw, "zstd")
            else:
                handle = raw
            yield cast("IO[bytes]", handle)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise UsageError(f"{path} is not a whole {suffix[1:]} file: {error}") from None
        except OSError as error:
            # bz2 and pyarrow have no error class of their own.
            if suffix not in COMPRESSED or error.errno is not None:
                raise
            raise UsageError(f"{path} is not a whole {suffix[1:]} file: {error}") from None


@contextmanager
def open_text(path: Path, encoding: str, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """The decompressed text of a file, read as it is asked for."""
    with open_binary(path) as raw:
        yield io.TextIOWrapper(raw, encoding=encoding, newline=newline)


def lines(path: Path, encoding: str, newline: str | None = None) -> Iterator[str]:
    """The lines of a file, one at a time. Raises `UsageError` for a line longer than `MOST_CHARACTERS`."""
    with open_text(path, encoding, newline) as handle:
        while line := handle.readline(MOST_CHARACTERS + 1):
            if len(line) > MOST_CHARACTERS:
                raise UsageError(
                    f"{path} holds a line of more than {MOST_CHARACTERS} characters", "Divide it"
                )
            yield line


def whole(path: Path, encoding: str) -> str:
    """All of a file. Raises `UsageError` for more than `MOST_CHARACTERS`."""
    with open_text(path, encoding) as handle:
        text = handle.read(MOST_CHARACTERS + 1)
    if len(text) > MOST_CHARACTERS:
        raise UsageError(
            f"{path} holds more than {MOST_CHARACTERS} characters", "Write one record a line (.jsonl)"
        )
    return text


def undecodable(path: Path, encoding: str) -> tuple[int, int] | None:
    """Where a file is no text in ``encoding``, and the byte there."""
    at, decoder = 0, codecs.getincrementaldecoder(encoding)()
    with open_binary(path) as raw:
        while True:
            part = raw.read(1 << 20)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                return at - held + error.start, error.object[error.start]
            if not part:
                return None
            at += len(part)

"""Read documents from a file, a directory, a dataset, or the texts inside the package."""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from loadstone.errors import UsageError
from loadstone.text.chat import ChatTemplate
from loadstone.text.files import Choose, Row, read_rows, readable, split_documents
from loadstone.text.folders import folder_rows, hub_rows, is_saved, saved_rows

log = logging.getLogger(__name__)
# In the package: all held-out stories (1.02M tokens of builtin:tiny-llama), the first of them, and older prose.
STORIES, SAMPLE, AUSTEN = "stories", "sample", "austen"
_SAMPLE_STORIES = 240
DEFAULT_COLUMN = "text"
# A longer text is read again where it is needed, and never held.
_HELD_CHARACTERS = 16 << 20
# A prompt and the document that follows it.
Pair = tuple[str, str]


@dataclass(frozen=True)
class Corpus:
    """The documents of a text, in order, none of them blank.

    ``documents``: a tuple, or for a long text an iterable that reads it again each time. ``prompts``: likewise, what is
    read before each document and not scored; empty where no document has such a beginning. ``sha256`` is over the
    documents and prompts themselves (length and UTF-8 bytes of each), never over names or paths. ``bytes``: UTF-8 bytes
    of all documents together.
    """

    source: str
    documents: Iterable[str]
    sha256: str
    prompts: Iterable[str] = ()
    bytes: int = 0

    def pairs(self) -> Iterator[Pair]:
        """Each prompt and its document."""
        if isinstance(self.documents, _Again):
            return self.documents.read()
        return zip(self.prompts or itertools.repeat(""), self.documents)  # noqa: B905


@dataclass(frozen=True)
class _Again:
    """The prompts (``at`` 0) or documents (``at`` 1) of a text, read again each time."""

    read: Callable[[], Iterator[Pair]]
    at: int

    def __iter__(self) -> Iterator[str]:
        return (pair[self.at] for pair in self.read())


def read_corpus(
    data: str = SAMPLE,
    *,
    column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    chat: ChatTemplate | None = None,
) -> Corpus:
    """Read the first ``limit`` non-blank documents of ``data``.

    ``data`` is one of the package's texts (``"sample"``, ``"stories"``, ``"austen"``), a file (.txt, .md, .raw or no
    suffix; .jsonl, .json, .csv, .parquet, .arrow; all but parquet also as .gz, .bz2, .xz or .zst), a directory
    that holds such files, with splits and configs as on the hub, or what ``datasets`` saved, or a dataset's hub name
    (``owner/name`` or ``owner/name:config``; directories take a config too).
    ``column`` names the text column of tables (default ``text``). With ``chat``, rows are conversations
    (`ChatTemplate.render`) and ``column`` that of their messages. Raises UsageError for an unknown suffix,
    a missing column or empty text, MissingError for a dataset that is not available.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}")

    def pairs() -> Iterator[Pair]:
        if chat is None:
            raw = _texts(data, column or DEFAULT_COLUMN, split)
        else:
            choose = lambda names, where: chat.columns(names, column, where)  # noqa: E731
            raw = (chat.render(row, column, where) for row, where in _rows(data, split, choose))
        return itertools.islice(((p, d) for p, d in raw if d.strip()), limit)

    try:
        return _corpus(data, pairs)
    except OSError as error:
        where = error.filename or data
        raise UsageError(
            f"{where} cannot be read ({error.strerror or error})", "Check its permissions"
        ) from None


def _corpus(data: str, read: Callable[[], Iterator[Pair]]) -> Corpus:
    """A corpus of what ``read`` gives each time, held in memory if it is short."""
    digest, count, size, room, prompted = hashlib.sha256(), 0, 0, _HELD_CHARACTERS, False
    held: list[Pair] = []
    for pair in read():
        prompt, document = pair
        size += _add(digest, document, f"document {count} of {data!r}")
        prompted = prompted or bool(prompt)
        count += 1
        room -= len(prompt) + len(document)
        if room >= 0:
            held.append(pair)
        else:
            held.clear()
    if not count:
        raise UsageError(f"there is no text in {data!r}", "Every document is empty or blank")
    if prompted:
        for number, (prompt, _) in enumerate(held if room >= 0 else read()):
            _add(digest, prompt, f"the prompt of document {number} of {data!r}")
    documents: Iterable[str] = tuple(d for _, d in held) if room >= 0 else _Again(read, 1)
    prompts: Iterable[str] = tuple(p for p, _ in held) if room >= 0 else _Again(read, 0)
    return Corpus(data, documents, digest.hexdigest(), prompts if prompted else (), size)


def _add(digest: Any, text: str, where: str) -> int:
    """Add a text to the hash of a corpus; its UTF-8 bytes. Raises UsageError for half a character."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} holds half a character ({text[error.start]!a}) at {error.start}",
            "An escape sequence was cut in two: mend or remove it",
        ) from None
    digest.update(len(encoded).to_bytes(8, "little"))
    digest.update(encoded)
    return len(encoded)


def _texts(data: str, column: str, split: str | None) -> Iterator[tuple[str, str]]:
    def choose(names: Sequence[str], where: str) -> list[str]:
        _require(column, names, where)
        return [column]

    return (("", _cell(row, column, where)) for row, where in _rows(data, split, choose))


def _rows(data: str, split: str | None, choose: Choose) -> Iterator[Row]:
    if not data:
        raise UsageError("--data is empty", "Name a file, a directory or a dataset")
    in_package = data in (SAMPLE, STORIES, AUSTEN)
    path, config = Path(data).expanduser(), ""
    if not in_package and not path.exists():
        folder, _, config = data.rpartition(":")
        if folder and Path(folder).expanduser().is_dir():
            path = Path(folder).expanduser()
        elif readable(path) or data.startswith((".", "/", "~")):
            raise UsageError(f"there is no file or directory {data!r}")
        else:
            return hub_rows(data, split, choose)
    if not in_package and is_saved(path):
        return saved_rows(path, split, choose)
    if not in_package and path.is_dir():
        return folder_rows(path, config, split, choose)
    if split is not None:
        log.warning("--split %s has no effect: %s has no splits", split, data)
    return _package_rows(data) if in_package else read_rows(path, choose)


def _package_rows(data: str) -> Iterator[Row]:
    packed = (
        files("loadstone").joinpath("data", f"{AUSTEN if data == AUSTEN else STORIES}.txt.xz").read_bytes()
    )
    count = _SAMPLE_STORIES if data == SAMPLE else None
    documents = split_documents(io.StringIO(lzma.decompress(packed).decode()))
    return ((document, data) for document in itertools.islice(documents, count))


def _cell(row: Any, column: str, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise UsageError(f"{where} is neither a string nor a record but {type(row).__name__}")
    _require(column, [str(k) for k in row], where)
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        hint = "Conversations are read with --chat" if isinstance(value, list) else ""
        raise UsageError(f"column {column!r} of {where} holds {type(value).__name__}, not text", hint)
    return value


def _require(column: str, names: Sequence[str], where: str) -> None:
    if column not in names:
        chat = "; conversations are read with --chat" if {*names} & {"messages", "conversations"} else ""
        raise UsageError(
            f"{where} has no column {column!r}",
            f"Choose one with --text-column; there are: {', '.join(names)}{chat}",
        )

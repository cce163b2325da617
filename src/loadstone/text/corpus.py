"""Read documents from a file, a directory, a dataset, or the texts inside the package."""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import lzma
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class Corpus:
    """The documents of a text, in order, none of them blank.

    ``prompts``: what is read before each document and not scored; empty where no document has such a beginning.
    ``sha256`` is over the documents and prompts themselves (length and UTF-8 bytes of each), never over names or paths.
    """

    source: str
    documents: tuple[str, ...]
    sha256: str
    prompts: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents together."""
        return sum(len(d.encode()) for d in self.documents)


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
    if chat is None:
        raw = _texts(data, column or DEFAULT_COLUMN, split)
    else:
        choose = lambda names, where: chat.columns(names, column, where)  # noqa: E731
        raw = (chat.render(row, column, where) for row, where in _rows(data, split, choose))
    try:
        pairs = list(itertools.islice(((p, d) for p, d in raw if d.strip()), limit))
    except OSError as error:
        where = error.filename or data
        raise UsageError(
            f"{where} cannot be read ({error.strerror or error})", "Check its permissions"
        ) from None
    if not pairs:
        raise UsageError(f"there is no text in {data!r}", "Every document is empty or blank")
    prompts = tuple(p for p, _ in pairs) if any(p for p, _ in pairs) else ()
    documents = tuple(d for _, d in pairs)
    return Corpus(data, documents, _sha256([*documents, *prompts], data), prompts)


def _sha256(texts: Sequence[str], data: str) -> str:
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"document {number} of {data!r} holds half a character ({text[error.start]!a}) at {error.start}",
                "An escape sequence was cut in two: mend or remove it",
            ) from None
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


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

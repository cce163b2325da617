"""Read documents from a file, a directory, a dataset, or the texts inside the package."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import logging
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from loadstone.errors import ArtifactError, MissingError, UsageError

log = logging.getLogger(__name__)
# In the package: all held-out stories (1.02M tokens of builtin:tiny-llama), the first of them, and older prose.
STORIES, SAMPLE, AUSTEN = "stories", "sample", "austen"
_SAMPLE_STORIES = 240
DEFAULT_COLUMN = "text"
DOCUMENT_BREAK = "\f"
_MARKERS = ("state.json", "dataset_info.json", "dataset_dict.json")
_SPLITS = ("test", "validation", "train")
# UTF-8 with or without the byte order mark that Windows programs write; it is not part of the text.
_ENCODING = "utf-8-sig"


@dataclass(frozen=True)
class Corpus:
    """The documents of a text, in order, none of them blank.

    ``sha256`` is over the documents themselves (length and UTF-8 bytes of each), never over names or paths.
    """

    source: str
    documents: tuple[str, ...]
    sha256: str

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents together."""
        return sum(len(d.encode()) for d in self.documents)


def read_corpus(
    data: str = SAMPLE, *, column: str | None = None, split: str | None = None, limit: int | None = None
) -> Corpus:
    """Read the first ``limit`` non-blank documents of ``data``.

    ``data`` is one of the package's texts (``"sample"``, ``"stories"``, ``"austen"``), a file (.txt, .jsonl,
    .json, .parquet, .csv; .txt.xz too), a directory that holds such files or that ``datasets`` saved, or a
    dataset's hub name (``owner/name`` or ``owner/name:config``).
    ``column`` names the text column of tables (default ``text``). Raises UsageError for an unknown suffix,
    a missing column or empty text, MissingError for a dataset that is not available.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}")
    raw = _documents(data, column or DEFAULT_COLUMN, split)
    try:
        documents = tuple(itertools.islice((d for d in raw if d.strip()), limit))
    except OSError as error:
        where = error.filename or data
        raise UsageError(f"{where} cannot be read ({error.strerror})", "Check its permissions") from None
    if not documents:
        raise UsageError(f"there is no text in {data!r}", "Every document is empty or blank")
    digest = hashlib.sha256()
    for number, document in enumerate(documents):
        try:
            encoded = document.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"document {number} of {data!r} holds half a character ({document[error.start]!a}) at {error.start}",
                "An escape sequence was cut in two: mend or remove it",
            ) from None
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return Corpus(data, documents, digest.hexdigest())


def _documents(data: str, column: str, split: str | None) -> Iterator[str]:
    if not data:
        raise UsageError("--data is empty", "Name a file, a directory or a dataset")
    path = Path(data).expanduser()
    in_package = data in (SAMPLE, STORIES, AUSTEN)
    if not in_package and path.is_dir() and any((path / marker).exists() for marker in _MARKERS):
        yield from _saved_dataset(path, column, split)
        return
    if not in_package and not path.exists():
        if path.suffix.lower() in _READERS or data.startswith((".", "/", "~")):
            raise UsageError(f"there is no file or directory {data!r}")
        yield from _hub_dataset(data, column, split)
        return
    if split is not None:
        log.warning("--split %s has no effect: %s has no splits", split, data)
    if in_package:
        name = AUSTEN if data == AUSTEN else STORIES
        packed = files("loadstone").joinpath("data", f"{name}.txt.xz").read_bytes()
        count = _SAMPLE_STORIES if data == SAMPLE else None
        yield from itertools.islice(_split(lzma.decompress(packed).decode()), count)
    elif path.is_dir():
        inner = sorted(p for p in path.iterdir() if p.suffix.lower() in _READERS and p.is_file())
        if not inner:
            raise UsageError(
                f"the directory {data!r} holds neither a saved dataset nor text", f"Known: {_known()}"
            )
        for file in inner:
            yield from _file(file, column)
    else:
        yield from _file(path, column)


def _file(path: Path, column: str) -> Iterator[str]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"cannot read {path}: unknown suffix {path.suffix!r}", f"Known: {_known()}")
    try:
        yield from reader(path, column)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
        ) from None


def _split(text: str) -> Iterator[str]:
    # A line holding only a form feed starts a new document; without one the text is one document.
    for document in text.split(f"\n{DOCUMENT_BREAK}\n"):
        yield document.strip("\n")


def _txt(path: Path, column: str) -> Iterator[str]:
    yield from _split(path.read_text(encoding=_ENCODING))


def _xz(path: Path, column: str) -> Iterator[str]:
    if path.with_suffix("").suffix.lower() != ".txt":
        raise UsageError(f"cannot read {path}: of compressed files only .txt.xz is known")
    try:
        yield from _split(lzma.decompress(path.read_bytes()).decode(_ENCODING))
    except lzma.LZMAError as error:
        raise UsageError(f"{path} is not a whole xz file: {error}") from None


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding=_ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _cell(_parsed(line, f"{path}:{number}"), column, f"{path}:{number}")


def _json(path: Path, column: str) -> Iterator[str]:
    rows = _parsed(path.read_text(encoding=_ENCODING), str(path))
    if not isinstance(rows, list):
        raise UsageError(
            f"{path} is not a list of strings or records", "Write one record a line in a .jsonl file"
        )
    for number, row in enumerate(rows):
        yield _cell(row, column, f"{path}[{number}]")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None


def _csv(path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding=_ENCODING, newline="") as handle:
        rows = csv.DictReader(handle)
        for row in rows:
            yield _cell(row, column, f"{path}:{rows.line_num}")


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not a readable parquet file: {error}") from None
    _require(column, table.schema_arrow.names, str(path))
    for batch in table.iter_batches(columns=[column]):
        for value in batch.column(0):
            yield _text(value.as_py(), column, str(path))


def _saved_dataset(path: Path, column: str, split: str | None) -> Iterator[str]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is not a readable saved dataset: {error}") from None
    yield from _dataset_rows(loaded, column, split, str(path))


def _hub_dataset(name: str, column: str, split: str | None) -> Iterator[str]:
    import datasets

    repo, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repo, config or None)
    except (ConnectionError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingError(
            f"{name!r} is not a file, and could not be loaded as a dataset: {reason}",
            "Give a file, a directory, or the name of a dataset that can be reached",
        ) from None
    yield from _dataset_rows(loaded, column, split, name)


def _dataset_rows(loaded: Any, column: str, split: str | None, where: str) -> Iterator[str]:
    if hasattr(loaded, "keys"):
        names = list(loaded.keys())
        chosen = split or next((s for s in _SPLITS if s in names), names[0])
        if chosen not in names:
            raise UsageError(f"{where} has no split {chosen!r}", f"It has: {', '.join(names)}")
        loaded = loaded[chosen]
    _require(column, loaded.column_names, where)
    for value in loaded[column]:
        yield _text(value, column, where)


def _cell(row: Any, column: str, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise UsageError(f"{where} is neither a string nor a record but {type(row).__name__}")
    _require(column, [str(k) for k in row], where)
    return _text(row[column], column, where)


def _require(column: str, names: Iterable[str], where: str) -> None:
    names = list(names)
    if column not in names:
        raise UsageError(
            f"{where} has no column {column!r}",
            f"Choose one with --text-column; there are: {', '.join(names)}",
        )


def _text(value: Any, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"column {column!r} of {where} holds {type(value).__name__}, not text")
    return value


def _known() -> str:
    return ", ".join(sorted(_READERS))


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _txt,
    ".xz": _xz,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}

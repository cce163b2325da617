"""Read documents from a file, a directory, a dataset, or the texts inside the package."""

from __future__ import annotations

import csv
import hashlib
import io
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

from loadstone.artifact.files import (
    check_folder,
    check_inside,
    open_regular,
    read_json,
    too_many_items,
    translated,
)
from loadstone.errors import MissingError, UsageError
from loadstone.text.opening import (
    COMPRESSED,
    MOST_CHARACTERS,
    inner_suffix,
    lines,
    undecodable,
    whole,
)

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
# Values in one JSON text, counted by its commas and brackets, those in prose too.
_MOST_ITEMS = 16_000_000


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

    ``data`` is one of the package's texts (``"sample"``, ``"stories"``, ``"austen"``), a file (.txt, .md, .raw or no
    suffix; .jsonl, .json, .csv, .parquet; all but the last also as .gz, .bz2, .xz or .zst), a directory that holds
    such files, ``data/train-*.parquet`` and other splits, or what ``datasets`` saved, or a dataset's hub name
    (``owner/name`` or ``owner/name:config``).
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
        if ((suffix := inner_suffix(path)) and suffix in _READERS) or data.startswith((".", "/", "~")):
            raise UsageError(f"there is no file or directory {data!r}")
        yield from _hub_dataset(data, column, split)
        return
    if not in_package and path.is_dir() and (parts := _split_files(path)):
        yield from _files_of_split(path, parts, column, split)
        return
    if split is not None:
        log.warning("--split %s has no effect: %s has no splits", split, data)
    if in_package:
        name = AUSTEN if data == AUSTEN else STORIES
        packed = files("loadstone").joinpath("data", f"{name}.txt.xz").read_bytes()
        count = _SAMPLE_STORIES if data == SAMPLE else None
        yield from itertools.islice(_split(io.StringIO(lzma.decompress(packed).decode())), count)
    elif path.is_dir():
        # A README beside the text is not part of it.
        inner = sorted(p for p in path.iterdir() if inner_suffix(p) in _IN_FOLDERS and p.is_file())
        if not inner:
            raise UsageError(
                f"the directory {data!r} holds neither a saved dataset nor text", f"Known: {_known()}"
            )
        for file in inner:
            yield from _file(file, column)
    else:
        yield from _file(path, column)


def _split_files(path: Path) -> dict[str, list[Path]]:
    """The files of each split of a data set's folder as the hub lays it out: ``data/train-00000-of-00002.parquet``."""
    found: dict[str, list[Path]] = {}
    for file in sorted((path / "data").glob("*")) if (path / "data").is_dir() else []:
        name = file.name.split(".")[0].split("-")[0]
        if inner_suffix(file) in _READERS and name in _SPLITS and file.is_file():
            found.setdefault(name, []).append(file)
    return found


def _files_of_split(
    path: Path, parts: dict[str, list[Path]], column: str, split: str | None
) -> Iterator[str]:
    chosen = split or next(s for s in _SPLITS if s in parts)
    if chosen not in parts:
        raise UsageError(f"{path} has no split {chosen!r}", f"It has: {', '.join(parts)}")
    for file in parts[chosen]:
        yield from _file(file, column)


def _file(path: Path, column: str) -> Iterator[str]:
    reader = _READERS.get(inner_suffix(path))
    if reader is None:
        raise UsageError(f"cannot read {path}: unknown suffix {path.suffix!r}", f"Known: {_known()}")
    try:
        yield from reader(path, column)
    except UnicodeDecodeError:
        at, byte = undecodable(path, "utf-8") or (0, 0)
        raise UsageError(f"{path} is not UTF-8 text: byte {at} is {byte:#x}") from None


def _split(lines: Iterable[str]) -> Iterator[str]:
    # A line holding only a form feed starts a new document; without one the text is one document.
    held: list[str] = []
    size = 0
    for line in lines:
        if line.rstrip("\n") == DOCUMENT_BREAK:
            yield "".join(held).strip("\n")
            held, size = [], 0
            continue
        held.append(line)
        size += len(line)
        if size > MOST_CHARACTERS:
            raise UsageError(
                f"a document has more than {MOST_CHARACTERS} characters",
                "Divide it with lines that hold only a form feed",
            )
    yield "".join(held).strip("\n")


def _txt(path: Path, column: str) -> Iterator[str]:
    yield from _split(lines(path, _ENCODING))


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(lines(path, _ENCODING), 1):
        if line.strip():
            yield _cell(_parsed(line, f"{path}:{number}"), column, f"{path}:{number}")


def _json(path: Path, column: str) -> Iterator[str]:
    # Many tools write JSON lines under this suffix too.
    first = next((line.strip() for line in lines(path, _ENCODING) if line.strip()), "")
    if first.startswith("{") and first.endswith("}"):
        yield from _jsonl(path, column)
        return
    rows = _parsed(whole(path, _ENCODING), str(path))
    if not isinstance(rows, list):
        raise UsageError(
            f"{path} is not a list of strings or records", "Write one record a line in a .jsonl file"
        )
    for number, row in enumerate(rows):
        yield _cell(row, column, f"{path}[{number}]")


def _parsed(text: str, where: str) -> Any:
    if too_many_items(text, _MOST_ITEMS):
        raise UsageError(f"{where} holds more than {_MOST_ITEMS} values", "Write one record a line (.jsonl)")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None


def _csv(path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = csv.DictReader(lines(path, _ENCODING, newline=""))
    try:
        for row in rows:
            yield _cell(row, column, f"{path}:{rows.line_num}")
    except csv.Error as error:
        raise UsageError(f"{path}:{rows.line_num} is not CSV: {error}") from None


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet

    if path.suffix.lower() in COMPRESSED:
        raise UsageError(f"{path} is compressed twice", "Decompress it: parquet is compressed inside")
    with open_regular(path, UsageError) as file, translated(str(path), "Write it again", UsageError):
        table = pyarrow.parquet.ParquetFile(file)
        _require(column, table.schema_arrow.names, str(path))
        # A few rows at once: the same long text in each of them takes no room in the file.
        for batch in table.iter_batches(batch_size=64, columns=[column]):
            for value in batch.column(0):
                yield _text(value.as_py(), column, str(path))


def _saved_dataset(path: Path, column: str, split: str | None) -> Iterator[str]:
    import datasets

    for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        check_folder(folder)
        stored = read_json(folder / "state.json") if (folder / "state.json").exists() else {}
        with translated(f"{folder}/state.json", "Save the dataset again"):
            for file in stored.get("_data_files", []):
                check_inside(folder, file["filename"])
    with translated(str(path), "Save the dataset again"):
        yield from _dataset_rows(datasets.load_from_disk(str(path)), column, split, str(path))


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
    return ", ".join(sorted(filter(None, _READERS))) + f"; compressed: {', '.join(COMPRESSED)}"


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    "": _txt,
    ".txt": _txt,
    ".md": _txt,
    ".raw": _txt,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
_IN_FOLDERS = frozenset(_READERS) - {"", ".md"}

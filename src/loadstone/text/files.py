"""The rows of text files: strings, or records of a table, each with where it stands."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from loadstone.artifact.files import open_regular, too_many_items, translated
from loadstone.errors import UsageError
from loadstone.text.opening import (
    COMPRESSED,
    MOST_CHARACTERS,
    inner_suffix,
    lines,
    open_binary,
    undecodable,
    whole,
)

# A string or a record, and its place for messages.
Row = tuple[Any, str]
# The columns to read, of a table's columns and its place. Raises UsageError where none of them serves.
Choose = Callable[[Sequence[str], str], list[str]]
DOCUMENT_BREAK = "\f"
# UTF-8 with or without the byte order mark that Windows programs write; it is not part of the text.
_ENCODING = "utf-8-sig"
# Values in one JSON text, counted by its commas and brackets, those in prose too.
_MOST_ITEMS = 16_000_000
# A few rows at once: the same long text in each of them takes no room in the file.
_BATCH = 64


def read_rows(path: Path, choose: Choose) -> Iterator[Row]:
    """The rows of a file, as they are read. Raises UsageError for a file that is not what its suffix says."""
    reader = _READERS.get(inner_suffix(path))
    if reader is None:
        raise UsageError(f"cannot read {path}: unknown suffix {path.suffix!r}", f"Known: {known()}")
    try:
        yield from reader(path, choose)
    except UnicodeDecodeError:
        at, byte = undecodable(path, "utf-8") or (0, 0)
        raise UsageError(f"{path} is not UTF-8 text: byte {at} is {byte:#x}") from None


def readable(path: Path) -> bool:
    """Whether the suffix of a file is known here."""
    return bool(inner_suffix(path)) and inner_suffix(path) in _READERS


def beside_others(path: Path) -> bool:
    """Whether a file is text where it lies among others: a README is not."""
    return readable(path) and inner_suffix(path) != ".md" and path.is_file()


def known() -> str:
    """The suffixes that are read, for messages."""
    return ", ".join(sorted(filter(None, _READERS))) + f"; compressed: {', '.join(COMPRESSED)}"


def split_documents(lines: Iterable[str]) -> Iterator[str]:
    """The documents of a text: a line that holds only a form feed starts another."""
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


def _txt(path: Path, choose: Choose) -> Iterator[Row]:
    for document in split_documents(lines(path, _ENCODING)):
        yield document, str(path)


def _jsonl(path: Path, choose: Choose) -> Iterator[Row]:
    for number, line in enumerate(lines(path, _ENCODING), 1):
        if line.strip():
            yield _parsed(line, f"{path}:{number}"), f"{path}:{number}"


def _json(path: Path, choose: Choose) -> Iterator[Row]:
    # Many tools write JSON lines under this suffix too.
    first = next((line.strip() for line in lines(path, _ENCODING) if line.strip()), "")
    if first.startswith("{") and first.endswith("}"):
        yield from _jsonl(path, choose)
        return
    rows = _parsed(whole(path, _ENCODING), str(path))
    if not isinstance(rows, list):
        raise UsageError(
            f"{path} is not a list of strings or records", "Write one record a line in a .jsonl file"
        )
    for number, row in enumerate(rows):
        yield row, f"{path}[{number}]"


def _parsed(text: str, where: str) -> Any:
    if too_many_items(text, _MOST_ITEMS):
        raise UsageError(f"{where} holds more than {_MOST_ITEMS} values", "Write one record a line (.jsonl)")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None


def _csv(path: Path, choose: Choose) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = csv.DictReader(lines(path, _ENCODING, newline=""))
    try:
        for row in rows:
            yield row, f"{path}:{rows.line_num}"
    except csv.Error as error:
        raise UsageError(f"{path}:{rows.line_num} is not CSV: {error}") from None


def _parquet(path: Path, choose: Choose) -> Iterator[Row]:
    import pyarrow.parquet

    if path.suffix.lower() in COMPRESSED:
        raise UsageError(f"{path} is compressed twice", "Decompress it: parquet is compressed inside")
    with (
        open_regular(path, UsageError) as file,
        translated(f"{path}: cannot be read", "Write it again", UsageError),
    ):
        table = pyarrow.parquet.ParquetFile(file)
        for batch in table.iter_batches(_BATCH, columns=choose(table.schema_arrow.names, str(path))):
            for row in batch.to_pylist():
                yield row, str(path)


def _arrow(path: Path, choose: Choose) -> Iterator[Row]:
    """A table as `datasets` writes it: an Arrow stream."""
    import pyarrow

    with open_binary(path) as file, translated(f"{path}: cannot be read", "Write it again", UsageError):
        stream = pyarrow.ipc.open_stream(file)
        columns = choose(stream.schema.names, str(path))
        for batch in stream:
            for at in range(0, batch.num_rows, _BATCH):
                part = batch.select(columns).slice(at, _BATCH)
                # Offsets of a damaged file would be followed out of memory.
                part.validate(full=True)
                for row in part.to_pylist():
                    yield row, str(path)


_READERS: dict[str, Callable[[Path, Choose], Iterator[Row]]] = {
    "": _txt,
    ".txt": _txt,
    ".md": _txt,
    ".raw": _txt,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}

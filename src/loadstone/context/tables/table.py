"""Tables from files, and the schema that ties a table's columns to a context's features.

A column whose every present value is a number is numeric. Any other is categorical: each text is replaced by its
position in the sorted list of those seen in training (an unseen one counts as missing). An empty cell, ``NA``, ``NaN``,
``null`` and ``?`` are missing values.
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.artifact.context_errors import SchemaMismatch
from loadstone.artifact.files import open_regular, translated
from loadstone.errors import ArtifactError, UsageError
from loadstone.text import opening

MISSING = frozenset({"", "na", "nan", "n/a", "null", "none", "?"})
# Integer targets with at most this many distinct values are classes unless --task says otherwise.
_MOST_CLASSES = 10
_MOST_CELLS = 10_000_000


@dataclass(frozen=True)
class Table:
    """Columns by name, in file order; every cell is the text that stands in the file."""

    path: str
    columns: dict[str, list[str]] = field(repr=False)

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()), []))


def read_table(path: str | Path) -> Table:
    """A ``.csv``, ``.tsv`` or ``.parquet`` table with a header; raises `UsageError` or `ArtifactError` naming it."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"there is no file '{path}'", "Check the path")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix not in (".csv", ".tsv", ".txt"):
        raise UsageError(f"'{path}': tables are read from .csv, .tsv and .parquet", "Convert it")
    with translated(f"'{path}' cannot be read as a table", "Save it as UTF-8 CSV"):
        rows = csv.reader(
            opening.lines(path, "utf-8-sig", ""), delimiter="\t" if path.suffix == ".tsv" else ","
        )
        lines = [line for line in rows if line]
    if not lines:
        raise ArtifactError(f"'{path}' is empty", "A table has a header and rows")
    header = [name.strip() for name in lines[0]]
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ArtifactError(f"'{path}': the column '{twice}' is duplicated in the header", "Rename one")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise ArtifactError(
                f"'{path}': row {number} has {len(line)} cells, the header {len(header)}", "Correct the row"
            )
    return Table(str(path), {name: [line[i].strip() for line in lines[1:]] for i, name in enumerate(header)})


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    with open_regular(path, UsageError) as handle, translated(f"'{path}' cannot be read as parquet"):
        file = pyarrow.parquet.ParquetFile(handle)
        if (cells := file.metadata.num_rows * file.metadata.num_columns) > _MOST_CELLS:
            # A column of one value takes no room in the file.
            raise UsageError(f"'{path}' has {cells} cells, over the limit of {_MOST_CELLS}", "Divide it")
        content = file.read().to_pydict()
    return Table(
        str(path), {n: ["" if v is None else str(v) for v in column] for n, column in content.items()}
    )


@dataclass(frozen=True)
class Schema:
    """Names of the features in order, the categories of those that are categorical, and the target's name."""

    names: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]
    target: str

    def to_json(self) -> dict[str, Any]:
        columns = {n: {"kind": "categorical", "values": list(v)} for n, v in self.categories.items()}
        numeric = {n: {"kind": "numeric"} for n in self.names if n not in columns}
        return {"names": list(self.names), "target": self.target, "columns": columns | numeric}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Schema:
        categories = {
            n: tuple(c["values"]) for n, c in facts["columns"].items() if c["kind"] == "categorical"
        }
        return cls(tuple(facts["names"]), categories, str(facts["target"]))


def infer_schema(table: Table, target: str) -> Schema:
    """The schema of a training table; raises `UsageError` for a target that is not there."""
    if target not in table.columns:
        near = difflib.get_close_matches(target, table.columns, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"There is {', '.join(list(table.columns)[:8])}"
        raise UsageError(f"'{table.path}' has no column '{target}'", hint)
    names = tuple(name for name in table.columns if name != target)
    if not names or not table.rows:
        raise UsageError(
            f"'{table.path}' has no features or no rows", "A table has features, a target and rows"
        )
    categories = {}
    for name in names:
        present = [cell for cell in table.columns[name] if cell.lower() not in MISSING]
        if not all(_is_number(cell) for cell in present):
            categories[name] = tuple(sorted(set(present)))
    return Schema(names, categories, target)


def features(table: Table, schema: Schema) -> np.ndarray:
    """(rows, features) float64 in the schema's order, NaN where missing.

    The target's own column may be there or not. Raises `SchemaMismatch` for features that are missing, unknown, or in
    another order, and for text in a numeric column.
    """
    names = [name for name in table.columns if name != schema.target]
    missing = [name for name in schema.names if name not in names]
    unknown = [name for name in names if name not in schema.names]
    if missing or unknown:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has besides {_some(unknown)}"] * bool(
            unknown
        )
        raise SchemaMismatch(
            f"'{table.path}' {' and '.join(parts)}; the context was fitted on {len(schema.names)} features",
            "Give the features it was fitted on",
        )
    if tuple(names) != schema.names:
        at = next(i for i, (a, b) in enumerate(zip(names, schema.names, strict=True)) if a != b)
        raise SchemaMismatch(
            f"'{table.path}': the features are in another order, column {at + 1} is '{names[at]}', "
            f"fitted as '{schema.names[at]}'",
            "Put the columns in the fitted order",
        )
    result = np.full((table.rows, len(names)), np.nan)
    for column, name in enumerate(names):
        places = (
            {value: i for i, value in enumerate(schema.categories[name])}
            if name in schema.categories
            else None
        )
        for row, cell in enumerate(table.columns[name]):
            if cell.lower() in MISSING:
                continue
            if places is not None:
                result[row, column] = places.get(cell, np.nan)
            elif _is_number(cell):
                result[row, column] = float(cell)
            else:
                raise SchemaMismatch(
                    f"'{table.path}': '{cell[:40]}' in row {row + 2} of the numeric column '{name}'",
                    "Leave it empty if it is missing",
                )
    return result


def guess_task(table: Table, target: str) -> str:
    """``classification`` for text and for a few distinct integers, ``regression`` for other numbers."""
    cells = set(table.columns[target])
    if not all(_is_number(cell) for cell in cells):
        return "classification"
    whole = all(float(cell).is_integer() for cell in cells)
    return "classification" if whole and len(cells) <= _MOST_CLASSES else "regression"


def class_targets(
    table: Table, target: str, classes: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """(position of each row's label, labels). Without ``classes`` the labels are those found, sorted.

    A label that is not among ``classes`` gets -1. Raises `UsageError` for a row without a label.
    """
    cells = table.columns[target]
    _check_present(table, target)
    labels = classes or sorted(
        set(cells), key=lambda c: (not _is_number(c), float(c) if _is_number(c) else 0.0, c)
    )
    places = {label: i for i, label in enumerate(labels)}
    return np.array([places.get(cell, -1) for cell in cells]), labels


def number_targets(table: Table, target: str) -> np.ndarray:
    """The target column as float64; raises `UsageError` for a row without a number."""
    _check_present(table, target)
    cells = table.columns[target]
    bad = next((i for i, cell in enumerate(cells) if not _is_number(cell)), None)
    if bad is not None:
        raise UsageError(
            f"'{table.path}': the target of row {bad + 2} is '{cells[bad][:40]}', not a number",
            "Correct it, or use --task classification",
        )
    return np.array([float(cell) for cell in cells])


def _check_present(table: Table, target: str) -> None:
    bad = next((i for i, cell in enumerate(table.columns[target]) if cell.lower() in MISSING), None)
    if bad is not None:
        raise UsageError(f"'{table.path}': row {bad + 2} has no target", "Remove the rows without a target")


def _is_number(cell: str) -> bool:
    try:
        return np.isfinite(float(cell)).item()
    except ValueError:
        return False


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown

"""How results look: rich tables on stdout, one progress bar on stderr, plain text wherever nobody watches."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def console() -> Any:
    """A rich console on stdout: no colour when piped or under NO_COLOR, never wrapped by a narrow pipe."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def table(title: str, columns: list[str], rows: list[list[str]], *, right: tuple[int, ...] = ()) -> Any:
    """A rich table; ``right`` numbers the right-aligned columns."""
    from rich import box
    from rich.table import Table

    result = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        result.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def print_json(value: Any) -> None:
    """One JSON document on stdout, and nothing else there."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def size(nbytes: float) -> str:
    """Bytes in decimal units: ``269.1 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


@contextmanager
def progress(label: str, total: int, *, unit_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that the yielded function advances; silent when stderr is no terminal or under --quiet."""
    if not sys.stderr.isatty() or logging.getLogger("loadstone").level > logging.INFO:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    amount = DownloadColumn() if unit_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)

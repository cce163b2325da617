"""How results look: rich tables on stdout, one progress bar on stderr, plain text wherever nobody watches."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from loadstone.errors import UsageError

# Characters of one message or cell.
_LONGEST = 2000


def console() -> Any:
    """A rich console on stdout: no colour when piped or under NO_COLOR, never wrapped by a narrow pipe."""
    from rich.console import Console
    from rich.segment import Segment

    class Out(Console):
        def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
            # Here all text passes on its way out, whatever shows it.
            for text, style, control in super().render(*args, **options):
                yield Segment(text if control else _spelled(text), style, control)

    return Out(highlight=False, width=None if sys.stdout.isatty() else 160)


def write(text: str) -> None:
    """Data to stdout, with an escape for each character that its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def one_line(text: str) -> str:
    """A message in one line, of at most a few thousand characters: names in a model are anybody's."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return _spelled(text).replace("\n", "\\n")


def _spelled(text: str) -> str:
    """Text with what could move a terminal's cursor, or turn the direction of writing, spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def table(title: str, columns: list[str], rows: list[list[str]], *, right: tuple[int, ...] = ()) -> Any:
    """A rich table of plain text, never markup; ``right`` numbers the right-aligned columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(
        title=Text(title, "bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD if any(columns) else None,
        show_header=any(columns),
        padding=(0, 3, 0, 1) if not any(columns) else (0, 1),
        pad_edge=False,
    )
    for number, name in enumerate(columns):
        result.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(one_line(cell)) for cell in row))
    return result


def runs_table(runs: Any) -> Any:
    """Where a quantized artifact runs (`artifact.servers.Runs`), a row for each server and scheme."""
    rows = [[run.server, run.scheme, "yes" if run.runs else "no", run.how] for run in runs]
    return table("Where it runs", ["", "scheme", "runs", "how"], rows)


def print_whole(rows: Any) -> None:
    """Print a table of figures: on a terminal too narrow for it lines run over, and no figure is cut."""
    from rich.measure import Measurement

    out = console()
    out.width = max(out.width, Measurement.get(out, out.options.update(width=10_000), rows).maximum)
    out.print(rows)


def print_json(value: Any) -> None:
    """One JSON document on stdout, and nothing else there."""
    text = to_json(value)
    # In an encoding that lacks a character only JSON's own escapes keep it.
    narrow = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    write(json.dumps(json.loads(text), indent=2) + "\n" if narrow else text)


def result(json_to: str | None, value: Any, show: Callable[[], None]) -> None:
    """Give a command's result: ``value`` as JSON to the file ``json_to``, and text on stdout by ``show``.

    With ``json_to="-"`` the JSON document goes to stdout and nothing else does.
    """
    if json_to == "-":
        return print_json(value)
    if json_to is not None:
        write_file(Path(json_to), to_json(value))
    show()


def to_json(value: Any) -> str:
    """JSON text of a result: what is not finite becomes null, for JSON has no NaN."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # What a terminal would obey, and bytes of a path that are no UTF-8, in JSON's own escapes.
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_file(option: str, path: Path) -> None:
    """Raise `UsageError` when a result cannot be written to ``path``: said before the work, not after it."""
    from loadstone.artifact.files import resolved
    from loadstone.writing.filesystem import is_plain, unfinished
    from loadstone.writing.publish import can_write

    try:
        if path.is_dir():
            raise UsageError(f"{option} {path} is a directory", "Name a file")
        if not resolved(path).parent.is_dir():
            raise UsageError(f"{option} {path}: its directory does not exist", "Make it first")
        writable = os.access(path, os.W_OK) if path.exists() else can_write(path)
        work = unfinished(resolved(path))
        if os.path.lexists(work) and (work.is_dir() or not is_plain(work)):
            raise UsageError(f"'{work}' is not a file, and {option} {path} needs that name", "Move it away")
    except PermissionError:
        writable = False
    except OSError as error:
        raise UsageError(f"{option} '{path}': {error.strerror}", "Choose another place") from None
    if not writable:
        raise UsageError(
            f"{option} {path} cannot be written", "Choose another place, or change its permissions"
        )


def write_file(path: Path, text: str) -> None:
    """Write a result's file, whole or not at all; a pipe, or a file in a folder that is not ours, as it is."""
    from loadstone.writing.filesystem import replacing
    from loadstone.writing.publish import can_write

    if path.exists() and not (path.is_file() and can_write(path)):
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path, follow=True) as file:
        file.write(text.encode())


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


@contextmanager
def stages(
    labels: dict[str, str], *, in_layers: tuple[str, ...] = ()
) -> Iterator[Callable[[str, int, int], None]]:
    """One bar after another for work in stages: yields ``advance(stage, done, total)``.

    ``labels``: what to show for each stage; ``in_layers``: stages that are counted in layers, others in bytes.
    """
    shown, before = "", 0
    with ExitStack() as bar:
        step: Callable[[int], None] = lambda count: None  # noqa: E731

        def advance(stage: str, done: int, total: int) -> None:
            nonlocal shown, before, step
            if stage != shown:
                bar.close()
                step = bar.enter_context(progress(labels[stage], total, unit_bytes=stage not in in_layers))
                shown, before = stage, 0
            step(done - before)
            before = done

        yield advance

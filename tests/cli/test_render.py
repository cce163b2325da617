"""What is printed: nothing of a file can move a terminal's cursor, turn its lines around or fill its screen."""

from __future__ import annotations

import json

import pytest

from loadstone.cli import render

HOSTILE = "\x1b[2J\r\x9b31m\u202eevil\udcff\u2028"


def test_tables_and_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = render.console()
    console.print(render.table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, "two\nlines"]]))
    console.print(HOSTILE, markup=False)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and "\\x1b[2J" in out and "\\u202e" in out
    # One row stays one line: a cell cannot write another row.
    assert "two\\nlines" in out


def test_long_names_are_cut_in_the_middle() -> None:
    shown = render.one_line("a" * 1_000_000 + "b" * 1_000_000)
    assert len(shown) < 2100 and shown.startswith("aaa") and shown.endswith("bbb") and " … " in shown


def test_json_is_the_same_value(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: [HOSTILE, "é", "日本"]}
    render.print_json(value)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and json.loads(out) == value and "日本" in out

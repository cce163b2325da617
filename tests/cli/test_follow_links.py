"""Every command reads a directory of links out of it when asked by `--follow-links`, and names the flag otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.tables import write_tables
from tests.helpers import run


def _linked(directory: Path, to: Path) -> Path:
    """A directory whose files are links to those of another."""
    to.mkdir()
    for path in directory.iterdir():
        (to / path.name).symlink_to(path.resolve())
    return to


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "{model}"],
        ["finalize", "-M", "{model}", "-o", "{out}", "--quantize", "int8-weight-only", "--verify"],
        ["export-fakequant", "-M", "{model}", "-o", "{out}", "--format", "fp8"],
        [
            "eval",
            "-M",
            "{model}",
            "--data",
            "sample",
            "--limit",
            "1",
            "--context-length",
            "32",
            "--separator",
            "1",
        ],
        ["fit", "-M", "{model}", "--prompt", "{prompt}", "-o", "{out}"],
    ],
    ids=lambda command: command[0],
)
def test_a_model(
    make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    model = _linked(make_model("llama-untied"), tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("A cat sat.")
    places = {"model": model, "out": tmp_path / "out", "prompt": tmp_path / "prompt.txt"}
    line = [part.format(**places) for part in command]
    code, shown, error = run(capsys, *line, "-q")
    assert code == 3 and "--follow-links" in shown + error
    code, _, error = run(capsys, *line, "-q", "--follow-links")
    assert code == 0, error


def test_a_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = write_tables(tmp_path)
    fit = ["fit", "--table", tables / "c-train.csv", "--target", "label", "-o", tmp_path / "fitted", "-q"]
    assert run(capsys, *fit)[0] == 0
    context = _linked(tmp_path / "fitted", tmp_path / "context")
    for line in (
        ["predict", "-M", context, "--data", tables / "c-new.csv"],
        ["eval", "-M", context, "--data", tables / "c-test.csv"],
        ["inspect", context],
    ):
        code, shown, error = run(capsys, *line, "-q")
        assert code == 3 and "--follow-links" in shown + error, line[0]
        code, _, error = run(capsys, *line, "-q", "--follow-links")
        assert code == 0, (line[0], error)

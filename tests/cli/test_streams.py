"""Standard streams that are closed, full, gone or narrow: the result and the exit code stay the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = f"'{sys.executable}' -m loadstone"
CLOSED = (">&-", "2>&-", "<&- >&- 2>&-")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("redirect", [*CLOSED, "2>/dev/full", "| head -c 1"])
@pytest.mark.parametrize("arguments", ["--version", "--help", "inspect {model}", "inspect {model} --json"])
def test_a_stream_that_is_closed_or_gone_is_no_error(tiny: Path, arguments: str, redirect: str) -> None:
    done = shell(f"{COMMAND} {arguments.format(model=tiny)} {redirect}")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_behind_stdout_is_said(tiny: Path) -> None:
    done = shell(f"{COMMAND} inspect {tiny} --json >/dev/full")
    assert done.returncode == 5 and b"stdout cannot be written (No space left" in done.stderr


def test_what_is_opened_after_a_closed_stream_does_not_get_its_output(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    code = (
        "import os, sys; from loadstone.cli.streams import protect; protect()\n"
        f"file = open({str(out)!r}, 'w'); file.write('kept'); file.flush()\n"
        "print('shown'); sys.stdout.flush(); os.write(1, b'by a library'); os.write(2, b'too')"
    )
    assert shell(f"'{sys.executable}' -c \"{code}\" <&- >&- 2>&-").returncode == 0
    assert out.read_text() == "kept"


def test_a_slow_reader_of_a_non_blocking_pipe_gets_all(tmp_path: Path) -> None:
    code = (
        "import os; from loadstone.cli import render; from loadstone.cli.streams import protect\n"
        "os.set_blocking(1, False); protect(); render.write('x' * 1_000_000)"
    )
    done = shell(f"'{sys.executable}' -c \"{code}\" | (sleep 0.5; wc -c)")
    assert done.stdout.strip() == b"1000000" and done.stderr == b""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_characters_that_an_encoding_lacks_are_replaced(tmp_path: Path, encoding: str) -> None:
    missing = tmp_path / "Größe — Δ"
    done = shell(f"{COMMAND} inspect '{missing}'", PYTHONIOENCODING=encoding)
    assert done.returncode == 2 and b"error: " in done.stderr and b"Traceback" not in done.stderr
    listed = shell(f"{COMMAND} finalize --list-recipes", PYTHONIOENCODING=encoding)
    assert listed.returncode == 0 and b"int8-weight-only" in listed.stdout


def test_json_keeps_every_character_in_every_encoding(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "Größe Δ"
    model.symlink_to(tiny)
    for encoding in ("ascii", "utf-8"):
        done = shell(f"{COMMAND} inspect '{model}' --json", PYTHONIOENCODING=encoding)
        assert json.loads(done.stdout)["path"] == str(model), done.stderr


@pytest.mark.parametrize("redirect", ["<&- >&- 2>&-", ">/dev/full"])
def test_a_failed_gate_and_the_files_outlive_the_streams(tiny: Path, tmp_path: Path, redirect: str) -> None:
    out, text = tmp_path / "r.json", tmp_path / "t.txt"
    text.write_text("A stone that knows the way. " * 20)
    options = (
        f"eval -M {tiny} --data {text} --context-length 64 --separator 1 --fail-if 'loss>0' --json {out}"
    )
    done = shell(f"{COMMAND} {options} {redirect}", PYTHONIOENCODING="ascii")
    assert done.returncode == 4, done.stderr
    assert json.loads(out.read_text())["models"]


def test_what_was_published_was_published(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        shell(f"{COMMAND} finalize -M {tiny} --quantize int8-weight-only -o {out} >&- 2>&-").returncode == 0
    )
    assert (out / "config.json").is_file()

"""What `main` makes of errors and signals, and how results are shown."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadstone.cli import main, render
from loadstone.errors import UsageError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command that fails with an error; exit code and stderr."""

    def run(error: BaseException, *flags: str) -> tuple[int, str]:
        def collect(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr("loadstone.artifact.report.collect", collect)
        with pytest.raises(SystemExit) as stop:
            main(["inspect", "somewhere", *flags])
        return int(stop.value.code or 0), capsys.readouterr().err

    return run


def test_debug_shows_the_traceback_and_keeps_the_exit_code(failing) -> None:
    code, err = failing(UsageError("wrong", "Do it right"), "--debug")
    assert code == 2 and "Traceback" in err and err.endswith("loadstone: error: wrong. Do it right\n")
    code, err = failing(RuntimeError("deep"), "--debug")
    assert code == 1 and "Traceback" in err and "unexpected RuntimeError: deep" in err
    assert "Traceback" not in failing(RuntimeError("deep"))[1]


@pytest.mark.parametrize(
    "number, code",
    [
        (errno.EIO, 5),
        (errno.ENOSPC, 5),
        (errno.EDQUOT, 5),
        (errno.EFBIG, 5),
        (errno.EROFS, 5),
        (errno.EACCES, 5),
        (errno.EMFILE, 5),
        (errno.ENAMETOOLONG, 2),
    ],
)
def test_what_the_system_refuses_is_one_line_with_the_path(failing, number: int, code: int) -> None:
    found, err = failing(OSError(number, os.strerror(number), "some/file"))
    assert found == code and err.count("\n") == 1
    assert f"'some/file': {os.strerror(number)}" in err and "unexpected" not in err


def test_where_python_leaves_out_docstrings(failing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "loadstone.cli.app.sys", SimpleNamespace(**vars(sys) | {"flags": SimpleNamespace(optimize=2)})
    )
    code, err = failing(ValueError("No `Args` or `Parameters` section is found in the docstring"))
    assert code == 5 and "PYTHONOPTIMIZE=2" in err and "unexpected" not in err


def test_a_current_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path)])
    assert stop.value.code == 5 and "the current directory no longer exists" in capsys.readouterr().err


def test_an_interrupt_says_so(failing) -> None:
    assert failing(KeyboardInterrupt()) == (130, "loadstone: error: interrupted\n")


def test_errors_cannot_write_to_the_terminal(failing) -> None:
    _, err = failing(UsageError("tensor '\x1b[2J\rX' is odd"))
    assert err == "loadstone: error: tensor '\\x1b[2J\\rX' is odd\n"


def test_cells_are_no_markup_and_figures_are_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    path, figures = f"/runs/[bold]{'long/' * 60}[/]", "2.0151 ± 0.0132"
    render.print_whole(render.table("a [red]title[/]", ["model", "loss"], [[path, figures]], right=(1,)))
    out = capsys.readouterr().out
    assert any(path in line and figures in line for line in out.splitlines()) and "a [red]title[/]" in out


def test_json_has_no_nan_and_takes_any_path() -> None:
    value = {"a": [math.nan, (math.inf, 1.5)], "é": "\udcff"}
    text = render.to_json(value)
    assert json.loads(text) == {"a": [None, [None, 1.5]], "é": "\udcff"} and "é" in text
    text.encode()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.json"
    render.write_file(file, "old")
    with pytest.raises(UnicodeEncodeError):
        render.write_file(file, "new \udcff")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    (tmp_path / "link").symlink_to(file)
    render.write_file(tmp_path / "link", "new")
    assert file.read_text() == "new" and (tmp_path / "link").is_symlink()


def test_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        render.write_file(pipe, "text")
        assert reader.communicate()[0] == "text" and pipe.is_fifo()


@pytest.mark.parametrize("number, stopped", [("SIGTERM", "Terminated"), ("SIGINT", "KeyboardInterrupt")])
def test_a_signal_in_a_call_back_stops_the_command_too(number: str, stopped: str) -> None:
    script = f"""
import os, signal, sys, time
from loadstone.cli import app
signal.signal(signal.SIGTERM, app._terminate)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.unraisablehook = app._stop_again
class Dying:
    def __del__(self):
        # Python ignores what is raised here.
        os.kill(os.getpid(), signal.{number})
try:
    Dying()
    time.sleep(20)
except {"app." if number == "SIGTERM" else ""}{stopped}:
    print("stopped")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "stopped\n"


def test_a_signal_leaves_no_lock_taken() -> None:
    """Sent while the main thread takes and gives back the lock of a condition, again and again."""
    script = """
import os, signal, threading, time
from loadstone.cli import app
signal.signal(signal.SIGTERM, app._terminate)
condition, taken = threading.Condition(threading.Lock()), 0
for number in range(40):
    sender = threading.Thread(target=lambda: (time.sleep(number * 1e-5), os.kill(os.getpid(), signal.SIGTERM)))
    try:
        sender.start()
        while True:
            with condition:
                pass
    except app.Terminated:
        pass
    sender.join()
    taken += not condition.acquire(blocking=False)
    if not taken:
        condition.release()
print(taken)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == "0\n"

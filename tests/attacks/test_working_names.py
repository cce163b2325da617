"""Every name that a command makes, beside its output and within its working directories, taken by something foreign.

The names are those that each command opens for writing, makes or renames, as Python's audit hooks report them. At each
lies in turn a link to a file, to nothing or to a folder outside, a folder, a pipe, a socket, a device: the command
refuses it by name or replaces it, and what the link points to stays as it was.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.attacks.crash import make_inputs
from tests.helpers import run

from loadstone.text import token_cache

SECRET = "not ours\n"
# Calls that make or change a name, with the position of names among their arguments.
_EVENTS = {"os.mkdir": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,)}
_made: list[str] | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _made is None:
        return
    if (
        event == "open"
        and isinstance(args[0], str | bytes)
        and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        _made.append(os.fsdecode(args[0]))
    for place in _EVENTS.get(event, ()):
        if isinstance(args[place], str | bytes | os.PathLike):
            _made.append(os.fsdecode(args[place]))


sys.addaudithook(_note)

_MODEL = "-M model --max-shard-size 60KB"
# Command line, earlier command that it continues or replaces, names that the user gave and that may be links.
COMMANDS: dict[str, tuple[str, str, set[str]]] = {
    "finalize": (f"finalize {_MODEL} --quantize int8-weight-only -o out", "", set()),
    "finalize, again": (f"finalize {_MODEL} --quantize int8-weight-only --overwrite -o out", "self", {"out"}),
    "finalize, continued": (f"finalize {_MODEL} --quantize int8-weight-only -o out", "killed", set()),
    "calibrated": (
        "finalize -M model --quantize intx4-weight-only --calibrate text.txt --calibrate-tokens 512 -o out", "", set(),
    ),
    "calibrated, continued": (
        "finalize -M model --quantize intx4-weight-only --calibrate text.txt --calibrate-tokens 512 -o out", "killed",
        set(),
    ),
    "export-fakequant": ("export-fakequant -M model --format nvfp4 -o out", "", set()),
    "export-fakequant, continued": ("export-fakequant -M model --format nvfp4 -o out", "killed", set()),
    "fit --table": ("fit --table table.csv --target y -o out", "", set()),
    "fit --prompt": ("fit -M model --prompt prompt.txt --overwrite -o out", "self", {"out"}),
    "predict": ("predict -M fitted --data table.csv -o out", "", {"out"}),
    "eval": (
        "eval -M model --separator 1 --cache cache --json out --report report.html --data text.txt", "",
        {"out", "report.html", "cache"},
    ),
    "inspect": ("inspect model --json out", "", {"out"}),
}  # fmt: skip


def _device(path: Path) -> None:
    # Endless zeros for whoever reads it.
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        # Its name is short: the address of a socket is.
        folder = os.open(path.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file": lambda path, outside: path.symlink_to(outside / "file"),
    "a link to nothing": lambda path, outside: path.symlink_to(outside / "nothing"),
    "a link to a folder": lambda path, outside: path.symlink_to(outside / "folder"),
    "another name of a file": lambda path, outside: path.hardlink_to(outside / "file"),
    "a folder": lambda path, outside: shutil.copytree(outside / "folder", path),
    "a pipe": lambda path, outside: os.mkfifo(path),
    "a socket": lambda path, outside: _socket(path),
    "a device": lambda path, outside: _device(path),
}


@dataclass
class Place:
    """A folder in which a command is run again and again, each time as it was at first."""

    folder: Path
    first: Path
    command: str
    given: set[str]
    names: list[str] = field(default_factory=list)

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.first, self.folder, symlinks=True)

    @property
    def outside(self) -> Path:
        return self.folder.parent / "outside"


def _state(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Of everything in a folder: kind, time of its change, content."""
    found = {}
    for entry in (path, *sorted(path.rglob("*"))):
        facts = entry.lstat()
        text = entry.read_bytes() if stat.S_ISREG(facts.st_mode) else b""
        found[str(entry.relative_to(path))] = (stat.S_IFMT(facts.st_mode), facts.st_mtime_ns, text)
    return found


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        found = path.lstat()
        return found.st_ino, stat.S_IFMT(found.st_mode)
    return None


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage") / "first"
    folder.mkdir()
    make_inputs(folder)
    (folder / "text.txt").write_text("The text to measure on. " * 300)
    return folder


@pytest.fixture
def place(
    request: pytest.FixtureRequest, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Place]:  # fmt: skip
    """The names of a command are noted while it runs undisturbed, from the state that it is to start from."""
    global _made
    command, before, given = COMMANDS[request.param]
    found = Place(tmp_path / "here", tmp_path / "first", command, given)
    shutil.copytree(stage, found.first)
    (found.outside / "folder").mkdir(parents=True)
    (found.outside / "file").write_text(SECRET)
    (found.outside / "folder" / "file").write_text(SECRET)
    monkeypatch.setattr(token_cache, "SMALLEST_TEXT", 0)
    found.reset()
    monkeypatch.chdir(found.folder)
    if command.startswith("predict"):
        assert run(capsys, *["fit", "--table", "table.csv", "--target", "y", "-o", "fitted"])[0] == 0
    if before == "self":
        assert run(capsys, *command.split())[0] == 0
    if before == "killed":
        # All but the last step is done, and everything that a kill leaves is there.
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("loadstone.finalization.run.publish", stop)
            patch.setattr("loadstone.finalization.run.close_journal", stop)
            run(capsys, *command.split())
        assert (found.folder / ".out.partial" / "key.json").exists()
    shutil.rmtree(found.first)
    shutil.copytree(found.folder, found.first)
    already = {str(path.relative_to(found.folder)) for path in found.folder.rglob("*")}
    already = {name for name in already if not name.startswith((".out", "out"))}
    _made = []
    try:
        code, _, err = run(capsys, *command.split())
        made, _made = _made, None
    finally:
        _made = None
    assert code == 0, err
    paths = {str(found.folder / name) for name in made}
    paths |= {str(path) for path in (found.first / ".out.partial").rglob("*")}
    paths |= {str(path) for path in (found.first / ".out.calibrated").rglob("*")}
    inside = {
        os.path.relpath(p, found.folder if p.startswith(f"{found.folder}/") else found.first) for p in paths
    }
    found.names = sorted(name for name in inside if not name.startswith("..") and name not in already)
    yield found


def disturbed(place: Place, name: str, kind: str, run_it: Callable[[], tuple[int, str]]) -> str:
    """What is wrong after the command met ``kind`` at ``name``; empty for nothing."""
    place.reset()
    os.chdir(place.folder)
    path = place.folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        KINDS[kind](path, place.outside)
    except PermissionError:
        return ""
    planted, before = _identity(path), _state(place.outside)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(20)
    try:
        code, err = run_it()
    finally:
        signal.alarm(0)
    wrong = []
    if _state(place.outside) != before:
        wrong.append("what it points to was changed")
    if code not in (0, 2, 3, 5):
        wrong.append(f"exit code {code}: {err[-300:]}")
    if code and not any(part in err for part in (name, Path(name).name, Path(name).parts[0])):
        wrong.append(f"the error names something else: {err[-300:]}")
    if code and _identity(path) != planted and not str(name).startswith(".out.partial"):
        wrong.append(f"it is gone after an error: {err[-300:]}")
    if not code and not (place.folder / "out").exists():
        wrong.append("no output")
    return f"{kind} at {name}: {'; '.join(wrong)}" if wrong else ""


def _too_long(*_: object) -> None:
    raise TimeoutError("waits for something that never comes")


def walk(place: Place, capsys: pytest.CaptureFixture[str], chosen: Callable[[int], bool]) -> list[str]:
    """What is wrong in the ``chosen`` of all cases."""

    def again() -> tuple[int, str]:
        code, _, err = run(capsys, *place.command.split())
        return code, err

    cases = [(name, kind) for name in place.names for kind in KINDS]
    wanted = [case for number, case in enumerate(cases) if chosen(number) and case[0] not in place.given]
    return [wrong for name, kind in wanted if (wrong := disturbed(place, name, kind, again))]


@pytest.mark.parametrize("place", ["finalize, continued", "fit --table", "inspect"], indirect=True)
def test_some_names_and_things(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    cases = len(place.names) * len(KINDS)
    chosen = set(random.Random(place.command).sample(range(cases), min(cases, 12)))
    assert walk(place, capsys, chosen.__contains__) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("place", COMMANDS, indirect=True)
def test_every_name_times_every_thing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(place.names) > 1
    assert walk(place, capsys, lambda number: True) == []

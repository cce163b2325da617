"""The place of an output, the lock on it, and its appearing: whole, in one step, whatever fails or is killed."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadstone.errors import MissingError, UsageError
from loadstone.writing import filesystem
from loadstone.writing.publish import (
    can_write,
    check_output,
    check_space,
    locked,
    new_directory,
    publish,
    working_path,
)


@pytest.fixture(params=["swapped", "two steps"])
def _replacing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to replace an output."""
    if request.param == "two steps":
        monkeypatch.setattr("loadstone.writing.publish.exchange", lambda one, other: False)


@pytest.fixture
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing takes most of the time where outputs are made by the hundred."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def make(out: Path, text: str, overwrite: bool = False) -> None:
    with new_directory(out, overwrite) as work:
        for name in ("config.json", "model.safetensors"):
            (work / name).write_text(text)


def content(out: Path) -> set[str]:
    """The texts of an output's files; fails unless both are there."""
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["config.json", "model.safetensors"]
    return {file.read_text() for file in files}


def test_a_lock_has_one_holder_and_leaves_nothing(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        with pytest.raises(UsageError, match="another process is writing"), locked(tmp_path / "out"):
            pass
        with locked(tmp_path / "other"):
            pass
    assert not any(tmp_path.iterdir())


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            # The holder before ends between open and flock.
            (tmp_path / ".out.lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr("loadstone.writing.filesystem.fcntl.flock", late)
    with locked(tmp_path / "out"):
        assert len(calls) == 2 and (tmp_path / ".out.lock").exists()
        with pytest.raises(UsageError), locked(tmp_path / "out"):
            pass


@pytest.mark.parametrize("name", [".", "..", "", "sub/.."])
def test_an_output_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(UsageError, match="has no name of its own"):
        check_output(None, Path(name), True)


def test_a_name_that_leaves_no_room_for_working_names(tmp_path: Path) -> None:
    for length in (250, 300):
        with pytest.raises(UsageError, match="is too long"):
            check_output(None, tmp_path / ("x" * length), False)


@pytest.mark.usefixtures("_replacing")
def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    out = tmp_path / "out"
    out.symlink_to("real")
    for _ in range(2):
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "new.safetensors").touch()
        with locked(out, overwrite=True):
            publish(tmp_path / "work", out, True)
        assert not out.is_symlink() and [p.name for p in out.iterdir()] == ["new.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "real"]
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["old"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    """The folder above several models, given in place of one of them."""
    out = tmp_path / "models"
    make(out / "one", "old")
    for _ in range(2):
        with pytest.raises(UsageError, match="no model among them"):
            make(out, "new", overwrite=True)
        (out / "notes.txt").touch()
    assert content(out / "one") == {"old"}
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "new", overwrite=True)


def test_a_link_to_nowhere_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(UsageError, match="exists"):
        check_output(None, tmp_path / "out", False)
    with pytest.raises(UsageError, match="is no directory"):
        check_output(None, tmp_path / "out", True)


@pytest.mark.parametrize("refusing", ["exists", "access"])
def test_a_folder_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    """Root may write everywhere: the system's refusal is played."""
    assert can_write(tmp_path / "new" / "deeper")

    def refused(*args: object) -> bool:
        raise PermissionError(13, "Permission denied")

    if refusing == "exists":
        monkeypatch.setattr(Path, "exists", refused)
    else:
        monkeypatch.setattr("loadstone.writing.publish.os.access", lambda path, mode: False)
    with pytest.raises(UsageError, match="cannot write"):
        check_output(None, tmp_path / "out", False)


@pytest.mark.usefixtures("_replacing")
def test_a_failed_replacement_leaves_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the renames fails."""
    out = tmp_path / "out"
    make(out, "old")
    real, calls = Path.rename, []

    for failing in (1, 2, 3, 4):
        calls.clear()

        def rename(path: Path, target: Path, failing: int = failing) -> Path:
            calls.append(path)
            if len(calls) == failing:
                raise OSError(errno.EIO, "Input/output error", str(path))
            return real(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            try:
                make(out, "new", overwrite=True)
            except MissingError as error:
                assert "Input/output error" in error.message and str(out) in error.message
            else:
                assert len(calls) < failing, "a failed rename went unnoticed"
        assert content(out) == ({"old"} if len(calls) >= failing else {"new"})
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("_quick_disk")
@pytest.mark.skipif(sys.platform != "linux", reason="names are swapped on Linux")
def test_a_reader_always_finds_a_whole_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "0")
    absent, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            if not out.is_dir():
                absent.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(100):
            make(out, str(number), overwrite=True)
    finally:
        stop.set()
        reader.join()
    assert not absent and content(out) == {"99"}


FILE_CALLS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "ctypes.dlsym",
    "shutil.rmtree",
}  # fmt: skip


def _killed_at(number: int, out: Path, text: str, overwrite: bool) -> int:
    """The exit code of a process that makes the output and is killed just before file-system call ``number``."""

    def work() -> None:
        left = number

        def count(event: str, arguments: object) -> None:
            nonlocal left
            if event in FILE_CALLS:
                left -= 1
                if left == 0:
                    os._exit(9)

        sys.addaudithook(count)
        make(out, text, overwrite)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return int(process.exitcode or 0)


@pytest.mark.usefixtures("_replacing", "_quick_disk")
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_call(tmp_path: Path, overwrite: bool, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    number, missing = 0, 0
    while True:
        number += 1
        if overwrite and not out.exists():
            make(out, "old")
        code = _killed_at(number, out, "new", overwrite)
        if out.exists():
            assert content(out) in ({"old"}, {"new"})
        elif overwrite:
            missing += 1
        before = out.exists()
        caplog.clear()
        make(out, "again", overwrite=overwrite or before)
        assert content(out) == {"again"}
        assert [p.name for p in tmp_path.iterdir()] == ["out"], number
        if overwrite and not before:
            assert "the output is put back" in caplog.text
        if code == 0:
            break
        make(out, "old", overwrite=True)
        if not overwrite:
            for file in [*out.iterdir()]:
                file.unlink()
            out.rmdir()
    assert number > 15
    # With swapped names there is no moment without an output.
    swaps = filesystem.exchange is sys.modules["loadstone.writing.publish"].exchange
    assert (missing > 0) == (overwrite and not swaps)


@pytest.mark.parametrize("directly", [True, False])
def test_an_output_set_aside_by_a_killed_run_is_put_back(
    tmp_path: Path, directly: bool, caplog: pytest.LogCaptureFixture
) -> None:
    out, aside = tmp_path / "out", working_path(tmp_path / "out", "replaced")
    make(aside if directly else aside / "output", "old")
    with pytest.raises(UsageError, match="exists"), locked(out):
        pass
    assert content(out) == {"old"} and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "killed while it wrote" in caplog.text and "put back" in caplog.text
    # Beside an output it is what was replaced.
    make(aside if directly else aside / "output", "older")
    with locked(out, overwrite=True):
        pass
    assert content(out) == {"old"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def _link(path: Path) -> None:
    target = path.parent / "elsewhere"
    target.mkdir()
    (target / "precious").write_text("precious")
    path.symlink_to(target)


def _file(path: Path) -> None:
    path.write_text("precious")


def _directory(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("precious")


def _everything(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        yield (
            str(path),
            str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else "",
        )


@pytest.mark.parametrize("odd", [_link, _file, _directory, os.mkfifo])
@pytest.mark.parametrize("ending", ["lock", "writing", "replaced", "partial", "calibrated"])
def test_odd_things_at_working_names_are_refused_by_name(
    tmp_path: Path, ending: str, odd: Callable[[Path], None]
) -> None:
    if (ending, odd) == ("partial", _directory):
        pytest.skip("its journal says whose it is: tests/finalization/test_resume.py")
    out = tmp_path / "out"
    odd(tmp_path / f".out.{ending}")
    before = list(_everything(tmp_path))
    for attempt in (
        lambda: check_output(None, out, False),
        lambda: make(out, "new"),
        lambda: make(out, "new", overwrite=True),
    ):
        with pytest.raises(UsageError, match=rf"\.out\.{ending}' was not made by loadstone"):
            attempt()
    assert list(_everything(tmp_path)) == before


def test_folders_made_for_an_output_go_with_it(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "new" / "deeper" / "out") as work:
            (work / "file").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not any(tmp_path.iterdir())
    # Not those of others.
    (tmp_path / "new").mkdir()
    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and not any((tmp_path / "new").iterdir())
    make(tmp_path / "new" / "deeper" / "out", "new")
    assert content(tmp_path / "new" / "deeper" / "out") == {"new"}


@pytest.mark.parametrize("ending", ["lock", "writing", "replaced"])
def test_what_a_kill_at_the_very_end_left_goes_when_the_output_is_refused(
    tmp_path: Path, ending: str
) -> None:
    make(tmp_path / "out", "new")
    left = working_path(tmp_path / "out", ending)
    if ending == "lock":
        left.touch()
    else:
        make(left / "output", "old")
    with pytest.raises(UsageError, match="exists"):
        check_output(None, tmp_path / "out", False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stale_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").touch()
    make(tmp_path / "out", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_file_systems_without_locks_and_directory_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """As NFS and FUSE answer: the output is made all the same, with one warning."""
    sync = os.fsync

    def refused(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    def sync_files(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            refused()
        sync(descriptor)

    monkeypatch.setattr(filesystem, "_warned", set())
    monkeypatch.setattr("loadstone.writing.filesystem.fcntl.flock", refused)
    monkeypatch.setattr("loadstone.writing.filesystem.os.fsync", sync_files)
    with caplog.at_level(logging.WARNING):
        make(tmp_path / "out", "old")
        make(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == {"new"}
    (warning,) = caplog.messages
    assert "no file locks" in warning and str(tmp_path) in warning


@pytest.mark.parametrize(
    "code, kind",
    [
        (errno.EIO, MissingError),
        (errno.ENOSPC, MissingError),
        (errno.EROFS, MissingError),
        (errno.EFBIG, MissingError),
        (errno.EACCES, MissingError),
        (errno.ENAMETOOLONG, UsageError),
    ],
)
def test_disk_errors_are_told_with_the_path(tmp_path: Path, code: int, kind: type[Exception]) -> None:
    out = tmp_path / "out"
    with pytest.raises(kind) as caught, new_directory(out) as work:
        raise OSError(code, os.strerror(code), str(work / "model.safetensors"))
    assert os.strerror(code) in str(caught.value) and "model.safetensors" in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_disk_with_too_little_space(tmp_path: Path) -> None:
    check_space(1, tmp_path / "out")
    with pytest.raises(MissingError, match=r"the output needs 1000000000\.07 GB"):
        check_space(10**18, tmp_path / "out")

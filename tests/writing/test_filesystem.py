"""Files that appear whole, and signals that wait."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loadstone.writing.filesystem import open_locked, replacing, uninterrupted


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in (b"first, which is longer", b"second"):
        with replacing(path) as file:
            file.write(text)
            assert not path.exists() or path.read_bytes() != text
        assert path.read_bytes() == text and names(tmp_path) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_a_file_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".file.partial").write_text("longer than what comes")
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_text() == "new" and names(tmp_path) == ["file"]


def test_a_link_that_a_user_named_is_written_through_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    with replacing(tmp_path / "link", follow=True) as file:
        file.write(b"new")
    assert (tmp_path / "target").read_text() == "new" and names(tmp_path) == ["link", "target"]


def test_another_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    """A link among the entries of a cache, say, to a file or a device elsewhere."""
    (tmp_path / "precious").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    for target in ("precious", "pipe"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        with replacing(tmp_path / "link") as file:
            file.write(b"new")
        assert (tmp_path / "link").read_text() == "new" and not (tmp_path / "link").is_symlink()
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("follow", [True, False])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, follow: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    path = tmp_path / ("link" if follow else "pipe")
    with pytest.raises(FileExistsError, match="is not a file"), replacing(path, follow=follow):
        pass
    assert (tmp_path / "pipe").is_fifo() and names(tmp_path) == ["link", "pipe"]


@pytest.mark.parametrize("odd", ["link", "directory", "fifo"])
def test_odd_things_at_the_working_name_are_not_followed(tmp_path: Path, odd: str) -> None:
    work = tmp_path / ".file.partial"
    if odd == "link":
        (tmp_path / "precious").write_text("precious")
        work.symlink_to("precious")
    elif odd == "directory":
        work.mkdir()
    else:
        os.mkfifo(work)
    before = names(tmp_path)
    with pytest.raises(FileExistsError, match="partial"), replacing(tmp_path / "file"):
        pass
    assert names(tmp_path) == before
    assert odd != "link" or (tmp_path / "precious").read_text() == "precious"


def test_a_lock_waits_only_when_it_is_told_to(tmp_path: Path) -> None:
    held = open_locked(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        open_locked(tmp_path / "lock")
    waiting = threading.Thread(target=lambda: os.close(open_locked(tmp_path / "lock", wait=True)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    (tmp_path / "lock").unlink()
    os.close(held)
    waiting.join(20)
    assert not waiting.is_alive() and (tmp_path / "lock").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_signal_waits_for_the_end_of_the_block(number: int, code: int) -> None:
    script = f"""
import os, signal
from loadstone.writing.filesystem import uninterrupted
# A job in the background inherits that interrupts are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
with uninterrupted():
    os.kill(os.getpid(), {int(number)})
    print("within", flush=True)
print("after", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout == "within\n"
    assert ended.returncode == code or (number == signal.SIGINT and ended.returncode in (130, -signal.SIGINT))


def test_in_another_thread_the_block_is_just_run() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]

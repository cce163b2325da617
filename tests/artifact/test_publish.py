"""The place of an output, and the lock on it: one holder at a time, also when its file is removed meanwhile."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from loadstone.errors import UsageError
from loadstone.writing.publish import can_write, check_output, locked, publish


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

    monkeypatch.setattr("loadstone.writing.publish.fcntl.flock", late)
    with locked(tmp_path / "out"):
        assert len(calls) == 2 and (tmp_path / ".out.lock").exists()
        with pytest.raises(UsageError), locked(tmp_path / "out"):
            pass


@pytest.mark.parametrize("name", [".", "..", "", "sub/.."])
def test_an_output_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(UsageError, match="has no name of its own"):
        check_output(None, Path(name), True)


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    out = tmp_path / "out"
    out.symlink_to("real")
    for _ in range(2):
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "new").touch()
        check_output(None, out, True)
        publish(tmp_path / "work", out, True)
        assert not out.is_symlink() and [p.name for p in out.iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "real"]
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["old"]


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

"""The lock on an output: one holder at a time, also when the file is removed while another waits for it."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from loadstone.artifact.publish import locked
from loadstone.errors import UsageError


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

    monkeypatch.setattr("loadstone.artifact.publish.fcntl.flock", late)
    with locked(tmp_path / "out"):
        assert len(calls) == 2 and (tmp_path / ".out.lock").exists()
        with pytest.raises(UsageError), locked(tmp_path / "out"):
            pass

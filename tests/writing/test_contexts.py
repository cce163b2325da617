"""Contexts appear as every output does, and leave alone what another command left beside them."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch

from loadstone.artifact.context_file import PFN
from loadstone.errors import MissingError, UsageError
from loadstone.writing.contexts import write_context
from loadstone.writing.publish import locked


def save(path: Path, value: float, overwrite: bool = False) -> Path:
    facts = {"kind": PFN, "value": value}
    return write_context(path, {"x": torch.full((4,), value)}, facts, overwrite=overwrite)


def test_an_existing_output(tmp_path: Path) -> None:
    out = save(tmp_path / "out", 1.0)
    with pytest.raises(UsageError, match=r"exists.*--overwrite"):
        save(out, 2.0)
    save(out, 2.0, overwrite=True)
    assert '"value": 2.0' in (out / "context.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(UsageError, match="is not a fitted context"):
        save(tmp_path / "model", 1.0, overwrite=True)


@pytest.mark.parametrize("swaps", [True, False])
def test_a_context_whose_rename_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    out = save(tmp_path / "out", 1.0)
    if not swaps:
        monkeypatch.setattr("loadstone.writing.publish.exchange", lambda one, other: False)
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if Path(target) == out and ".replaced" not in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, target)

    def refused(one: Path, other: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error", str(one))

    if swaps:
        monkeypatch.setattr("loadstone.writing.publish.exchange", refused)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(MissingError, match="Input/output error"):
        save(out, 2.0, overwrite=True)
    assert '"value": 1.0' in (out / "context.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_work_of_another_finalize_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "journal").mkdir(parents=True)
    (tmp_path / ".out.partial" / "journal" / "shard.json").touch()
    save(tmp_path / "out", 1.0)
    assert (tmp_path / ".out.partial" / "journal" / "shard.json").exists()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(UsageError, match="another process is writing"):
        save(tmp_path / "out", 1.0)
    assert not any(tmp_path.iterdir())


def test_a_disk_with_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10**6))
    with pytest.raises(MissingError, match=r"has 0\.00 GB free and the output needs"):
        save(tmp_path / "new" / "out", 1.0)
    assert not any(tmp_path.iterdir())

"""Readers of a directory that is replaced, or written to, while they read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.artifact import detect
from loadstone.artifact.unchanged import Changed, check_unchanged, read_at_once, stamp_of
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.loading import loader
from loadstone.writing.filesystem import exchange


def copied(source: Path, out: Path, fill: float) -> Path:
    """A copy whose weights are all ``fill``, and whose config says so."""
    model = loadstone.load(source)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(fill)
    model.config.fill = fill
    model.save_pretrained(out)
    return out


def test_a_directory_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    reads = []

    def read() -> tuple[str, str]:
        reads.append(1)
        first = (tmp_path / "one" / "a").read_text()
        if len(reads) < 4:
            assert exchange(tmp_path / "one", tmp_path / "two")
        return first, (tmp_path / "one" / "a").read_text()

    assert read_at_once(tmp_path / "one", read) == ("two", "two") and len(reads) == 4


@pytest.mark.parametrize("gone", [True, False])
def test_an_error_of_a_directory_that_was_replaced_is_no_answer(tmp_path: Path, gone: bool) -> None:
    (tmp_path / "one").mkdir()
    reads = []

    def read() -> str:
        reads.append(1)
        if gone and len(reads) == 1:
            shutil.rmtree(tmp_path / "one")
            (tmp_path / "one").mkdir()
            (tmp_path / "one" / "a").write_text("new")
        return (tmp_path / "one" / "a").read_text()

    if gone:
        assert read_at_once(tmp_path / "one", read) == "new"
    else:
        with pytest.raises(FileNotFoundError):
            read_at_once(tmp_path / "one", read)
        assert len(reads) == 1


def test_what_changes_each_time_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()

    def read() -> None:
        shutil.rmtree(tmp_path / "one")
        (tmp_path / "one").mkdir()

    with pytest.raises(Changed, match="replaced while it was read"):
        read_at_once(tmp_path / "one", read)


def test_a_stamp_notices_other_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    stamp = stamp_of(tmp_path, ["a", "absent"])
    check_unchanged(tmp_path, stamp)
    (tmp_path / "b").write_text("beside it")
    check_unchanged(tmp_path, stamp)
    (tmp_path / "a").write_text("12")
    with pytest.raises(Changed, match="a' changed while it was read"):
        check_unchanged(tmp_path, stamp)
    check_unchanged(Path("elsewhere"), stamp_of(tmp_path, ["a"], absolute=True))


@pytest.mark.parametrize("moment", ["before the files are opened", "after the weights are read"])
def test_load_does_not_mix_two_directories(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    copied(tiny, tmp_path / "out", 1.0)
    copied(tiny, tmp_path / "other", 2.0)
    where, name = (loader, "replace") if moment.startswith("before") else (loader, "check_unchanged")
    real: Callable[..., object] = getattr(where, name)
    calls = []

    def late(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            assert exchange(tmp_path / "out", tmp_path / "other")
        return real(*args, **options)

    monkeypatch.setattr(where, name, late)
    model = loadstone.load(tmp_path / "out")
    assert len(calls) == 2 and model.config.fill == 2.0
    assert all((weight == 2.0).all() for weight in model.parameters())
    # A plan is of the directory that it was made for.
    plan = loadstone.plan(tmp_path / "out")
    calls.clear()
    with pytest.raises(Changed):
        loadstone.load(plan)


def test_finalize_does_not_publish_what_changed_meanwhile(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    plan = make_plan(detect(source), None)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(Changed, match=r"model\.safetensors' changed"):
        write_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()

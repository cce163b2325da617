"""Answers on disk: found again under the same question and the same libraries, and under no other."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from loadstone import memo as module
from loadstone.memo import Memo, environment, user_directory


def asked(memo: Memo, key: object = 1, what: str = "sum", answer: object = 3) -> bool:
    """Whether the question had to be asked."""
    calls = []

    def make() -> object:
        calls.append(1)
        return answer

    assert memo.ask(what, key, make) == answer
    return bool(calls)


def test_asked_once(tmp_path: Path) -> None:
    prepared = []
    assert asked(Memo(tmp_path, lambda: prepared.append(1)))
    assert not asked(Memo(tmp_path, lambda: prepared.append(2)))
    assert prepared == [1]
    assert asked(Memo(tmp_path), key=2) and asked(Memo(tmp_path), what="product")
    assert all(asked(Memo()) for _ in range(2)) and all(asked(Memo(tmp_path).unkept()) for _ in range(2))
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".json"]


def test_another_version_is_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(Memo(tmp_path))
    whole = environment()
    assert [entry[0] for entry in whole[1:]] == [
        "torch",
        "torchao",
        "transformers",
        "accelerate",
        "loadstone",
    ]
    real = importlib.metadata.Distribution.version
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.metadata.Distribution, "version", property(lambda self: real.fget(self) + ".1")
        )
        assert environment() != whole and asked(Memo(tmp_path))
    source = Path(module.__file__).parent / "quantization" / "rules.py"
    times = source.stat()
    with monkeypatch.context() as patch:
        stat = Path.stat

        def touched(self: Path, **options: object):
            found = stat(self, **options)  # type: ignore[arg-type]
            return found if self != source else type(times)([*found[:8], found[8] + 1, found[9]])

        patch.setattr(Path, "stat", touched)
        assert asked(Memo(tmp_path))
    assert not asked(Memo(tmp_path))


def test_libraries_that_may_change_unnoticed_keep_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.PathDistribution.read_text

    def read_text(self: importlib.metadata.PathDistribution, name: str) -> str | None:
        return '{"dir_info": {"editable": true}}' if name == "direct_url.json" else real(self, name)

    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", read_text)
    assert environment() == []
    assert all(asked(Memo(tmp_path)) for _ in range(2)) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b'{"question": "other", "answer": 4}', b"[" * 100_000]
)
def test_a_damaged_answer_is_asked_anew(tmp_path: Path, damage: bytes) -> None:
    assert asked(Memo(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    assert asked(Memo(tmp_path)) and not asked(Memo(tmp_path))
    assert json.loads(file.read_text()) == {"question": "sum", "answer": 3}


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert all(asked(Memo(tmp_path / "file")) for _ in range(2))


def test_old_answers_are_removed(tmp_path: Path) -> None:
    import os

    old = tmp_path / "old.json"
    old.write_text("{}")
    os.utime(old, (1, 1))
    assert asked(Memo(tmp_path)) and not old.exists()


def test_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_directory() == tmp_path / "loadstone" / "facts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_directory() == tmp_path / ".cache" / "loadstone" / "facts"

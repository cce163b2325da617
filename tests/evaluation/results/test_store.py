from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadstone.errors import UsageError
from loadstone.evaluation.results.store import entry_key, open_store
from loadstone.text.corpus import read_corpus
from loadstone.text.tokens import Protocol, make_protocol, tokenize

NAN = float("nan")


@pytest.fixture(scope="module")
def protocol(tokenizer: Any) -> Protocol:
    return make_protocol(tokenize(read_corpus(limit=2), tokenizer), dtype="float32", longest=128)


def test_keyed_by_content(protocol: Protocol) -> None:
    key = entry_key(protocol, ["aa"], {"fast": True})
    assert key == entry_key(
        replace(protocol, data="elsewhere.txt", tokenizer_sha256="copy"), ["aa"], {"fast": True}
    )
    others = [
        entry_key(protocol, ["bb"], {"fast": True}),
        entry_key(protocol, ["aa", "bb"], {"fast": True}),
        entry_key(protocol, ["aa"], {"fast": False}),
        entry_key(replace(protocol, dtype="bfloat16"), ["aa"], {"fast": True}),
        entry_key(replace(protocol, tokens_sha256="0"), ["aa"], {"fast": True}),
        entry_key(replace(protocol, stride=3), ["aa"], {"fast": True}),
    ]
    assert len({key, *others}) == 7


def test_finished_entries_come_back_to_the_bit(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "new" / "cache"))
    key = "ab" * 32
    assert store.finished(key) is None
    values = {"nll": np.array([1.5, 2.25], dtype=np.float32), "kl": np.array([1e-9, 1 / 3])}
    store.finish(key, values, {"model": {"seconds": 2.0}})
    found = store.finished(key)
    assert found is not None and found[1] == {"model": {"seconds": 2.0}}
    for name, value in values.items():
        assert found[0][name].dtype == value.dtype and np.array_equal(found[0][name], value)


def test_partials_of_several_processes_merge(tmp_path: Path) -> None:
    store, key = open_store(str(tmp_path)), "cd" * 32
    assert store.partial(key) is None
    store.save_partial(key, 0, {"nll": np.array([1.0, NAN, NAN, NAN])})
    store.save_partial(key, 1, {"nll": np.array([NAN, 2.0, NAN, NAN])})
    store.save_partial(key, 1, {"nll": np.array([NAN, 2.0, 3.0, NAN])})
    merged = store.partial(key)
    assert merged is not None and np.array_equal(merged["nll"], [1.0, 2.0, 3.0, NAN], equal_nan=True)
    store.finish(key, {"nll": np.zeros(4)}, {})
    assert store.partial(key) is None and [p.name for p in tmp_path.rglob("*.npz")] == [f"{key}.scores.npz"]


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: bytes | None, caplog: Any) -> None:
    store, key = open_store(str(tmp_path)), "ef" * 32
    store.finish(key, {"nll": np.arange(1000.0)}, {})
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:300] if damage is None else damage)
    assert store.finished(key) is None


def test_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="--cache"):
        open_store(str(tmp_path / "file" / "inner"))

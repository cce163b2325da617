from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadstone.errors import UsageError
from loadstone.evaluation.results.saved import read_saved
from loadstone.evaluation.results.store import entry_key, open_store
from loadstone.text.corpus import read_corpus
from loadstone.text.tokenizing import tokenize
from loadstone.text.tokens import Protocol, make_protocol

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


def test_an_entry_copied_over_another_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    store.finish("ab1", {"nll": np.arange(3.0)}, {})
    store.finish("ab2", {"nll": np.arange(4.0)}, {})
    first, second = sorted(tmp_path.rglob("*.npz"))
    first.write_bytes(second.read_bytes())
    assert store.finished("ab1") is None and store.finished("ab2") is not None
    assert caplog.text.count("computing it again") == 1


@pytest.mark.parametrize("kind", ["fifo", "directory", "compressed", "checksum"])
def test_odd_entries_are_computed_again(tmp_path: Path, kind: str) -> None:
    store = open_store(str(tmp_path))
    store.finish("ab1", {"nll": np.zeros(1000)}, {})
    (path,) = tmp_path.rglob("*.npz")
    with np.load(path) as packed:
        arrays = dict(packed)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "compressed":
        np.savez_compressed(path, **arrays)
    else:  # a whole file of its own name, with another number in it
        np.savez(path, **{**arrays, "nll": np.ones(1000)})
    assert store.finished("ab1") is None


def saved(protocol: Protocol) -> dict[str, Any]:
    total = float(protocol.tokens) * 2.0
    record = {
        "path": "m",
        "loss": 2.0,
        "reference": True,
        "unit_losses": [total / 2, total / 2],
        "delta_loss": None,
    }
    return {"protocol": asdict(protocol), "models": [record]}


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "2"},
        {"loss": float("nan")},
        {"loss": 1.5},
        {"unit_losses": []},
        {"unit_losses": [[1.0]]},
        {"unit_losses": [float("inf")]},
        {"path": 3},
        {"loss_stderr": [1.0]},
        {"perplexity": "many"},
        {"load_seconds": {}},
        {"tasks": [1]},
    ],
)
def test_saved_results_are_held_to_themselves(
    tmp_path: Path, protocol: Protocol, change: dict[str, Any]
) -> None:
    path, result = tmp_path / "r.json", saved(protocol)
    path.write_text(json.dumps(result))
    assert read_saved(str(path)).record["loss"] == 2.0
    result["models"][0] |= change
    path.write_text(json.dumps(result))
    with pytest.raises(UsageError):
        read_saved(str(path))


def test_a_saved_result_that_is_no_file(tmp_path: Path, protocol: Protocol) -> None:
    os.mkfifo(tmp_path / "r.json")
    with pytest.raises(UsageError, match="not a regular file"):
        read_saved(str(tmp_path / "r.json"))
    wrong = saved(protocol)
    wrong["protocol"]["tokens"] = "many"
    (tmp_path / "s.json").write_text(json.dumps(wrong))
    with pytest.raises(UsageError, match="tokens is a str"):
        read_saved(str(tmp_path / "s.json"))

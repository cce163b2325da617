from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadstone.text import token_cache as tokencache
from loadstone.text.corpus import read_corpus
from loadstone.text.stream import TokenStream
from loadstone.text.tokenizing import tokenize


@pytest.fixture(autouse=True)
def any_text_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokencache, "SMALLEST_TEXT", 1)


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, real: Any, delay: float = 0.0) -> None:
        self.real, self.delay, self.calls = real, delay, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __len__(self) -> int:
        return len(self.real)

    def __call__(self, texts: Any, **options: Any) -> Any:
        if isinstance(texts, list):
            self.calls += 1
            time.sleep(self.delay)
        return self.real(texts, **options)


def same(a: TokenStream, b: TokenStream) -> bool:
    return all(
        np.array_equal(getattr(a.tokens, name), getattr(b.tokens, name))
        and getattr(a.tokens, name).dtype == getattr(b.tokens, name).dtype
        for name in ("ids", "prompts", "texts", "bytes", "words")
    )


def test_found_by_content(tokenizer: Any, tokenizer_factory: Any, tmp_path: Path) -> None:
    corpus = read_corpus(limit=5)
    counting = Counting(tokenizer)
    plain = tokenize(corpus, tokenizer)
    made = tokenize(corpus, counting, cache=tmp_path)
    assert counting.calls == 1 and same(plain, made)
    # Under another name, and with another separator: the same text and tokenizer.
    found = tokenize(replace(corpus, source="copy"), counting, separator="17", cache=tmp_path)
    assert counting.calls == 1 and same(found, tokenize(corpus, tokenizer, separator="17"))
    tokenize(read_corpus(limit=4), counting, cache=tmp_path)
    assert counting.calls == 2
    other = Counting(tokenizer_factory(vocabulary=300))
    tokenize(corpus, other, cache=tmp_path)
    assert other.calls == 1


def test_damaged_files_are_made_again(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus, counting = read_corpus(limit=3), Counting(tokenizer)
    plain = tokenize(corpus, counting, cache=tmp_path)
    (counts,), (ids,) = tmp_path.glob("*.npz"), tmp_path.glob("*.tokens")
    for file in (counts, ids):
        whole = file.read_bytes()
        for broken in (b"", whole[: len(whole) // 2], whole.replace(whole[300:310], b"0123456789")):
            # As anything but the cache would: the mapped file stays.
            file.unlink()
            file.write_bytes(broken)
            before = counting.calls
            assert same(tokenize(corpus, counting, cache=tmp_path), plain)
            assert counting.calls == before + 1
    ids.unlink()
    assert same(tokenize(corpus, counting, cache=tmp_path), plain)
    assert same(tokenize(corpus, counting, cache=tmp_path), plain)
    assert "is damaged" in caplog.text and not list(tmp_path.glob("*.tmp"))


def test_one_tokenizes_and_the_others_wait(tokenizer: Any, tmp_path: Path) -> None:
    corpus, counting = read_corpus(limit=3), Counting(tokenizer, delay=0.2)
    streams: list[TokenStream] = []
    threads = [
        threading.Thread(target=lambda: streams.append(tokenize(corpus, counting, cache=tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counting.calls == 1 and len(streams) == 4 and all(same(streams[0], s) for s in streams)


def test_a_killed_process_leaves_no_lock(tokenizer: Any, tmp_path: Path) -> None:
    held = tmp_path / "held"
    code = f"""
import time, pathlib
from loadstone.text.token_cache import cached_tokens
def make(put):
    pathlib.Path({str(held)!r}).touch()
    time.sleep(60)
cached_tokens(pathlib.Path({str(tmp_path)!r}), "text", "tokenizer", make)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while not held.exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    counts = {name: np.array([3, 0]) for name in tokencache.COUNTS} | {"prompts": np.array([0, 0])}

    def make(put: tokencache.Put) -> tokencache.Counts:
        put(np.arange(3, dtype=np.int32))
        return counts

    made = tokencache.cached_tokens(tmp_path, "text", "tokenizer", make)
    again = tokencache.cached_tokens(tmp_path, "text", "tokenizer", lambda put: pytest.fail("made again"))
    assert made.ids.tolist() == again.ids.tolist() == [0, 1, 2] and made.texts.tolist() == [3, 0]
    assert made.mapping is not None and again.mapping is not None


def test_a_directory_that_cannot_be_written(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    corpus = read_corpus(limit=2)
    assert same(tokenize(corpus, tokenizer, cache=tmp_path / "file" / "x"), tokenize(corpus, tokenizer))


def test_short_texts_and_old_entries(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize(read_corpus(limit=2), tokenizer, cache=tmp_path)
    (first,) = tmp_path.glob("*.npz")
    os.utime(first, (0, 0))
    tokenize(read_corpus(limit=3), tokenizer, cache=tmp_path)
    assert not first.exists() and len(list(tmp_path.glob("*.npz"))) == 1
    assert len(list(tmp_path.glob("*.tokens"))) == 2
    monkeypatch.setattr(tokencache, "SMALLEST_TEXT", 1 << 30)
    tokenize(read_corpus(limit=4), tokenizer, cache=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 1

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadstone.errors import UsageError
from loadstone.text.corpus import Corpus, read_corpus
from loadstone.text.stream import Tokens, TokenStream
from loadstone.text.tokenizing import _encoder, count_words, tokenize
from loadstone.text.tokens import PROTOCOLS, Windows, make_protocol, make_windows, resampling_units


def scored_positions(stream: TokenStream, windows: Windows) -> np.ndarray:
    spans = [
        np.arange(f, s + n + 1) for s, n, f in zip(windows.start, windows.length, windows.first, strict=True)
    ]
    everything = np.concatenate(spans)
    return everything[stream.document[everything] >= 0]


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("context", [2, 7, 64, 128, 100_000])
def test_every_token_of_text_is_scored_once(tokenizer: Any, name: str, context: int) -> None:
    stream = tokenize(read_corpus(limit=4), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=None, name=name, context_length=context)
    windows = make_windows(stream, protocol)
    assert np.array_equal(np.sort(scored_positions(stream, windows)), stream.scored)
    assert (windows.length <= context).all() and (windows.length >= 1).all()
    assert (windows.start >= 0).all() and (windows.start + windows.length < len(stream.ids)).all()
    # A target is never among its own inputs' future: it lies right after the input that predicts it.
    assert (windows.first > windows.start).all()


@pytest.mark.parametrize("stride", [1, 3, 32, 64])
def test_strided_windows_give_at_least_the_promised_context(tokenizer: Any, stride: int) -> None:
    stream = tokenize(read_corpus(limit=1), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=None, context_length=64, stride=stride)
    assert protocol.name == ("packed" if stride == 64 else "strided")
    windows = make_windows(stream, protocol)
    seen = windows.first - windows.start
    assert seen[0] == 1 and (seen[1:] >= 64 - stride + 1).all()


def test_rolling_windows_are_lm_evals(tokenizer: Any) -> None:
    """The expected windows are what lm-eval 0.4.13's get_rolling_token_windows gives for 10 tokens, 4 at
    a time."""
    stream = tokenize(Corpus("x", ("0x1x2x3x4x",), "0"), tokenizer)
    assert len(stream.ids) == 11
    windows = make_windows(stream, make_protocol(stream, dtype="f", longest=4, name="rolling"))
    assert list(
        zip(windows.start.tolist(), windows.length.tolist(), windows.first.tolist(), strict=True)
    ) == [
        (0, 4, 1),
        (4, 4, 5),
        (6, 4, 9),
    ]


def test_rolling_never_crosses_documents(tokenizer: Any) -> None:
    stream = tokenize(read_corpus(limit=5), tokenizer)
    windows = make_windows(stream, make_protocol(stream, dtype="f", longest=100, name="rolling"))
    for s, n in zip(windows.start, windows.length, strict=True):
        assert len(set(stream.document[s + 1 : s + n + 1])) == 1


def test_stream_layout(tokenizer: Any, bos_tokenizer: Any) -> None:
    corpus = read_corpus(limit=3)
    stream = tokenize(corpus, tokenizer)
    separators = np.flatnonzero(stream.document < 0)
    assert len(separators) == 3 and (stream.ids[separators] == tokenizer.eos_token_id).all()
    for i, document in enumerate(corpus.documents):
        assert tokenizer.decode(stream.ids[stream.document == i]) == document
        assert stream.tokens.bytes[i] == len(document.encode())
    assert not stream.adds_bos
    with_bos = tokenize(corpus, bos_tokenizer)
    assert with_bos.adds_bos and with_bos.separator == "<begin>"
    assert make_protocol(with_bos, dtype="f", longest=64).bos_each_window
    assert not make_protocol(with_bos, dtype="f", longest=64, name="rolling").bos_each_window
    assert tokenize(corpus, bos_tokenizer, separator="eos").separator == "<end>"
    assert tokenize(corpus, tokenizer, separator="17").separator_id == 17


def test_separator_errors(tokenizer: Any, tokenizer_factory: Any) -> None:
    corpus = read_corpus(limit=1)
    with pytest.raises(UsageError, match="no BOS token"):
        tokenize(corpus, tokenizer, separator="bos")
    with pytest.raises(UsageError, match="400 is not a token"):
        tokenize(corpus, tokenizer, separator="400")
    with pytest.raises(UsageError, match="none of auto"):
        tokenize(corpus, tokenizer, separator="newline")
    with pytest.raises(UsageError, match=r"no BOS or EOS.*--separator ID"):
        tokenize(corpus, tokenizer_factory(eos=None), separator="auto")


def test_protocol_errors(tokenizer: Any) -> None:
    stream = tokenize(read_corpus(limit=1), tokenizer)
    for options, message in [
        ({"context_length": 129}, "129 is more than the 128 positions"),
        ({"context_length": 1}, "at least 2"),
        ({"context_length": 64, "stride": 65}, "between 1 and the context"),
        ({"context_length": 64, "stride": 0}, "between 1 and the context"),
        ({"name": "sliding"}, "none of packed, strided, rolling"),
        ({"name": "rolling", "stride": 8}, "no meaning for the rolling"),
    ]:
        with pytest.raises(UsageError, match=message):
            make_protocol(stream, dtype="f", longest=128, **options)


def test_protocols_differ_in_what_matters(tokenizer: Any) -> None:
    stream = tokenize(read_corpus(limit=2), tokenizer)
    a = make_protocol(stream, dtype="float32", longest=128)
    assert a.context_length == 128 and a.differences(a) == []
    b = make_protocol(stream, dtype="bfloat16", longest=128, stride=64)
    assert a.differences(b) == ["name", "stride", "dtype"]
    longer = make_protocol(tokenize(read_corpus(limit=3), tokenizer), dtype="float32", longest=128)
    assert {"data_sha256", "tokens_sha256", "documents", "tokens"} <= set(a.differences(longer))


def units_of(edges: np.ndarray) -> np.ndarray:
    """The unit of each scored token."""
    return np.repeat(np.arange(len(edges) - 1), np.diff(edges))


def test_positions_are_found_from_offsets(tokenizer: Any) -> None:
    """Every answer of the stream, of documents with and without prompts and one without tokens, against arrays of all
    positions."""
    ids = [[5], [6, 7, 8], [], [9, 10]]
    prompts = [[], [1, 2], [3], []]
    stream = TokenStream(
        Tokens(
            np.array([t for p, d in zip(prompts, ids, strict=True) for t in [*p, *d]], dtype=np.int32),
            np.array([len(p) for p in prompts]),
            np.array([len(d) for d in ids]),
            *np.ones((2, 4), dtype=np.int64),
        ),
        separator_id=0, separator="", adds_bos=False, tokenizer_sha256="", corpus=Corpus("x", (), ""),
    )  # fmt: skip
    assert stream.ids.tolist() == [0, 5, 0, 1, 2, 6, 7, 8, 0, 3, 0, 9, 10]
    assert stream.document.tolist() == [-1, 0, -1, -1, -1, 1, 1, 1, -1, -1, -1, 3, 3]
    assert stream.slot(stream.scored).tolist() == list(range(6)) and stream.count == 6
    assert stream.slot(np.array([0, 2, 5, 8, 13])).tolist() == [0, 1, 1, 4, 6]
    assert stream.text(1).tolist() == [6, 7, 8] and stream.text(1, 2).tolist() == [6, 7]
    assert stream.text(2).tolist() == [] and stream.highest == 10
    # An empty last document has no token of its own.
    cut = TokenStream(
        Tokens(stream.tokens.ids[:1], np.zeros(2, int), np.array([1, 0]), *np.ones((2, 2), dtype=np.int64)),
        separator_id=0, separator="", adds_bos=False, tokenizer_sha256="", corpus=Corpus("x", (), ""),
    )  # fmt: skip
    assert cut.ids.tolist() == [0, 5, 0]


def test_resampling_units(tokenizer: Any) -> None:
    many = tokenize(read_corpus(limit=30), tokenizer)
    units = units_of(resampling_units(many, make_protocol(many, dtype="f", longest=128)))
    assert np.array_equal(units, many.document[many.scored])
    few = tokenize(read_corpus(limit=3), tokenizer)
    protocol = make_protocol(few, dtype="f", longest=128)
    assert protocol.resampled == "segments of 512 tokens"
    units = units_of(resampling_units(few, protocol))
    owner = few.document[few.scored]
    assert units[-1] >= 4 and (np.diff(units) >= 0).all() and np.bincount(units).max() == 512
    # No segment spans two documents.
    assert all(len(set(owner[units == u])) == 1 for u in range(units[-1] + 1))


def test_units_are_bounded(tokenizer: Any) -> None:
    corpus = Corpus("x", tuple("abc" for _ in range(9000)), "0")
    stream = tokenize(corpus, tokenizer)
    units = units_of(resampling_units(stream, make_protocol(stream, dtype="f", longest=128)))
    assert units[-1] < 4096 and np.bincount(units).min() > 0


def test_words_are_counted_as_a_split_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.text.tokenizing._COUNTED", 3)
    spaces = "".join(
        map(chr, (*range(9, 14), 28, 29, 30, 31, 32, 0x85, 0xA0, 0x1680, 0x2000, 0x2028, 0x3000))
    )
    texts = [
        "a",
        "a b",
        " a  b\n\nc ",
        "   ",
        "ab cd   ef",
        "é" + spaces + "x",
        *(f"a{s}b" for s in spaces),
        "\x00​a",
    ]
    for text in texts:
        assert count_words(text) == len(re.split(r"\s+", text)), repr(text)


@pytest.mark.parametrize("special", [False, True])
def test_many_documents_at_once_give_what_the_tokenizer_gives(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, special: bool
) -> None:
    """The tokenizers library's own call, in several threads, against the tokenizer's, one document at a time."""
    monkeypatch.setattr("loadstone.text.tokenizing._BATCH_DOCUMENTS", 3)
    tokenizer.split_special_tokens = special
    texts = ["é😀 ", "a" * 5000, f"x {tokenizer.eos_token} y", *read_corpus(limit=20).documents] * 3
    assert _encoder(tokenizer) is not None
    found = tokenize(Corpus("x", tuple(texts), "0"), tokenizer)
    for number, text in enumerate(texts):
        assert found.text(number).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    tokenizer.split_special_tokens = False


def test_a_tokenizer_with_a_call_of_its_own_is_called(tokenizer: Any) -> None:
    class Upper(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
            return super().__call__([t.upper() for t in text], *args, **options)

    own = copy.copy(tokenizer)
    own.__class__ = Upper
    assert _encoder(own) is None
    stream = tokenize(Corpus("x", ("abc",), "0"), own, separator="1")
    assert tokenizer.decode(stream.text(0)) == "ABC"


def test_a_long_text_is_read_again_and_never_held(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = read_corpus(limit=30).documents
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    short = read_corpus(str(file))
    monkeypatch.setattr("loadstone.text.corpus._HELD_CHARACTERS", 1000)
    long = read_corpus(str(file))
    assert isinstance(short.documents, tuple) and not isinstance(long.documents, tuple)
    assert (long.sha256, long.bytes) == (short.sha256, short.bytes) and tuple(
        long.documents
    ) == short.documents
    assert tokenize(long, tokenizer).sha256 == tokenize(short, tokenizer).sha256
    with file.open("a") as more:
        more.write('{"text": "more"}\n')
    with pytest.raises(UsageError, match="changed while it was read"):
        tokenize(long, tokenizer)

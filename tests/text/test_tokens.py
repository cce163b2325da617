from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loadstone.errors import UsageError
from loadstone.text.corpus import Corpus, read_corpus
from loadstone.text.tokens import (
    PROTOCOLS,
    TokenStream,
    Windows,
    make_protocol,
    make_windows,
    resampling_units,
    tokenize,
)


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
        assert stream.bytes[i] == len(document.encode())
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


def test_resampling_units(tokenizer: Any) -> None:
    many = tokenize(read_corpus(limit=30), tokenizer)
    units = resampling_units(many, make_protocol(many, dtype="f", longest=128))
    assert np.array_equal(units, many.document[many.scored])
    few = tokenize(read_corpus(limit=3), tokenizer)
    protocol = make_protocol(few, dtype="f", longest=128)
    assert protocol.resampled == "segments of 512 tokens"
    units = resampling_units(few, protocol)
    owner = few.document[few.scored]
    assert units[-1] >= 4 and (np.diff(units) >= 0).all() and np.bincount(units).max() == 512
    # No segment spans two documents.
    assert all(len(set(owner[units == u])) == 1 for u in range(units[-1] + 1))


def test_units_are_bounded(tokenizer: Any) -> None:
    corpus = Corpus("x", tuple("abc" for _ in range(9000)), "0")
    stream = tokenize(corpus, tokenizer)
    units = resampling_units(stream, make_protocol(stream, dtype="f", longest=128))
    assert units[-1] < 4096 and np.bincount(units).min() > 0

"""Token ids of a corpus, on all cores, and through the token cache if it is long."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.errors import ArtifactError, UsageError
from loadstone.loading.loader import using
from loadstone.text import token_cache
from loadstone.text.chat import ChatTemplate
from loadstone.text.corpus import Corpus, Pair
from loadstone.text.stream import Tokens, TokenStream

# Documents tokenized by one call, and about how many characters.
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 18
# Characters whose words are counted at once: a list of them takes fifty bytes each.
_COUNTED = 1 << 20
Progress = Callable[[int], None]


def tokenize(
    corpus: Corpus,
    tokenizer: Any,
    *,
    separator: str = "auto",
    cache: Path | None = None,
    chat: ChatTemplate | None = None,
    progress: Progress | None = None,
) -> TokenStream:
    """Tokenize a corpus once. ``separator`` is ``auto``, ``bos``, ``eos`` or a token id; ``cache``: a directory
    for the tokens of long texts; ``chat``: what rendered the corpus; ``progress`` is called with bytes of documents.

    Raises UsageError when the tokenizer has no such token, or turns the text into no token at all.
    """
    with using(tokenizer):
        separator_id = find_separator(tokenizer, separator)
        tokens = _tokens(corpus, tokenizer, cache, progress)
        if not tokens.texts.any():
            raise UsageError(f"the tokenizer turns {corpus.source!r} into no tokens")
        return TokenStream(
            tokens=tokens,
            separator_id=separator_id,
            separator=str(tokenizer.convert_ids_to_tokens(separator_id)),
            adds_bos=_adds_bos(tokenizer),
            tokenizer_sha256=tokenizer_hash(tokenizer),
            corpus=corpus,
            chat_template_sha256=chat.sha256 if chat else "",
        )


def _tokens(corpus: Corpus, tokenizer: Any, cache: Path | None, progress: Progress | None) -> Tokens:
    def make(put: token_cache.Put) -> token_cache.Counts:
        return _write(corpus, tokenizer, put, progress)

    # Only tokenizers of the tokenizers library serialise completely; one written in Python also depends on its code.
    if (
        cache is not None
        and corpus.bytes >= token_cache.SMALLEST_TEXT
        and hasattr(tokenizer, "backend_tokenizer")
    ):
        return token_cache.cached_tokens(cache, corpus.sha256, tokenizer_hash(tokenizer), make)
    return token_cache.tokens_in_memory(make)


def _write(
    corpus: Corpus, tokenizer: Any, put: token_cache.Put, progress: Progress | None
) -> token_cache.Counts:
    """Give the ids of each prompt and its document, int32, to ``put``; the tokens, bytes and words of each."""
    counts = {name: array("q") for name in token_cache.COUNTS}
    for (prompt, document), prompt_ids, ids in _encoded(corpus.pairs(), tokenizer):
        if prompt:
            put(prompt_ids)
        put(ids)
        size = len(document.encode())
        row = (len(prompt_ids), len(ids), size, count_words(document))
        for name, value in zip(token_cache.COUNTS, row, strict=True):
            counts[name].append(value)
        if progress is not None:
            progress(size)
    if corpus.bytes and sum(counts["bytes"]) != corpus.bytes:
        raise UsageError(f"{corpus.source!r} changed while it was read", "Run again once it is complete")
    return {name: np.frombuffer(values, dtype=np.int64) for name, values in counts.items()}


def _encoded(pairs: Iterable[Pair], tokenizer: Any) -> Iterator[tuple[Pair, np.ndarray, np.ndarray]]:
    """Each prompt and document with their ids, in order; as many batches at once as there are cores."""
    encode = _encoder(tokenizer)
    if encode is None:
        for batch in _batches(pairs):
            yield from _joined(batch, _plain(tokenizer, _texts(batch)))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[tuple[list[Pair], Future[list[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(cores) as pool:
        for batch in _batches(pairs):
            waiting.append((batch, pool.submit(encode, _texts(batch))))
            if len(waiting) > 2 * cores:
                first, found = waiting.popleft()
                yield from _joined(first, found.result())
        for first, found in waiting:
            yield from _joined(first, found.result())


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[0]) + len(pair[1])
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _texts(batch: list[Pair]) -> list[str]:
    """The documents of a batch, and the prompts that are not empty."""
    return [*(document for _, document in batch), *(prompt for prompt, _ in batch if prompt)]


def _joined(batch: list[Pair], ids: list[np.ndarray]) -> Iterator[tuple[Pair, np.ndarray, np.ndarray]]:
    prompts = iter(ids[len(batch) :])
    nothing = np.empty(0, dtype=np.int32)
    for pair, own in zip(batch, ids, strict=False):
        yield pair, next(prompts) if pair[0] else nothing, own


def _plain(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    # `verbose=False`: a document longer than the context is normal here, not worth a warning.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return [np.array(ids, dtype=np.int32) for ids in tokenizer(texts, **options)["input_ids"]]


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[np.ndarray]] | None:
    """The tokenizers library's own call for a batch, which gives what the tokenizer's call gives and releases Python's
    lock; None for a tokenizer with a call of its own."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    plain = TokenizersBackend
    if not isinstance(tokenizer, plain) or any(
        getattr(type(tokenizer), name) is not getattr(plain, name)
        for name in ("__call__", "_encode_plus", "_convert_encoding")
    ):
        return None
    # Sets truncation, padding and special tokens as a call does.
    _plain(tokenizer, ["a"])
    backend = tokenizer.backend_tokenizer

    def encode(texts: list[str]) -> list[np.ndarray]:
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    return encode


def count_words(text: str) -> int:
    r"""The parts that ``re.split(r"\s+", text)`` gives, as lm-eval counts words: an empty one before or after too."""
    gaps, spaced = 0, False
    for at in range(0, len(text), _COUNTED):
        piece = text[at : at + _COUNTED]
        begins, ends = piece[0].isspace(), piece[-1].isspace()
        # One gap between every two words, and those at the ends; one that goes on from the last piece counts once.
        gaps += len(piece.split()) - 1 + begins + ends - (spaced and begins)
        spaced = ends
    return gaps + 1


def find_separator(tokenizer: Any, separator: str) -> int:
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    named["auto"] = named["eos"] if named["bos"] is None else named["bos"]
    if separator.isdecimal():
        if int(separator) >= len(tokenizer):
            raise UsageError(f"--separator {separator} is not a token: the tokenizer has {len(tokenizer)}")
        return int(separator)
    if separator not in named:
        raise UsageError(f"--separator {separator!r} is none of auto, bos, eos or a token id")
    found = named[separator]
    if found is None:
        raise UsageError(
            f"the tokenizer has no {'BOS or EOS' if separator == 'auto' else separator.upper()} token",
            "Give the id of the token that should start every document: --separator ID",
        )
    return int(found)


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def require_known(highest: int, count: int, tokenizer: Any, name: str, part: str = "embedding has") -> None:
    """Raise ArtifactError, naming the token, when the ``highest`` id of a text is beyond the ``count`` of a model's."""
    if highest < count:
        return
    token = f" ({tokenizer.convert_ids_to_tokens(highest)!r})" if tokenizer is not None else ""
    raise ArtifactError(
        f"the text holds token {highest}{token}, and the model '{name}' has no such token: its {part} {count} tokens",
        "Use the tokenizer that the model was trained with, or resize its embedding and train the new tokens",
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Content hash of a tokenizer: of its serialised form, or of the vocabulary of one written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()

"""Tokenize documents into one stream, and divide it into windows that score every token of text exactly once.

The stream is ``[sep] document 0 [sep] document 1 ...``: the separator (BOS where the tokenizer has one,
else EOS) starts every document and is never scored itself. The three protocols cut the same stream and
score the same tokens; they differ only in how much context each token has:

* ``packed``: blocks of ``context_length`` inputs side by side. A block's first token sees one token only.
* ``strided``: a window of ``context_length`` moves by ``stride``; each token but the first ones sees at
  least ``context_length - stride`` others.
* ``rolling``: each document alone, in lm-eval's rolling log-likelihood windows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.errors import ArtifactError, UsageError
from loadstone.loading.loader import using
from loadstone.text import token_cache as tokencache
from loadstone.text.chat import ChatTemplate
from loadstone.text.corpus import Corpus

PACKED, STRIDED, ROLLING = "packed", "strided", "rolling"
PROTOCOLS = (PACKED, STRIDED, ROLLING)
DEFAULT_CONTEXT = 1024
_TOKENIZE_BATCH = 256
# With fewer documents than this, segments of them are resampled: so few say little about their spread.
_FEW_DOCUMENTS = 20
SEGMENT_TOKENS = 512
# With more units than this, neighbours are drawn together: the bootstrap would be slower and no better.
_MOST_UNITS = 4096


@dataclass(frozen=True, eq=False)
class TokenStream:
    """A corpus in tokens. ``S`` counts all positions of the stream, separators included.

    ``ids``: int64 (S,). ``document``: int32 (S,), the index of the document a position belongs to, -1 at
    separators and prompts. ``starts``: int64 (documents,), the positions of the separators. ``bytes``, ``words``:
    int64 (documents,), UTF-8 bytes and whitespace-separated words of each document.
    """

    ids: np.ndarray
    document: np.ndarray
    starts: np.ndarray
    bytes: np.ndarray
    words: np.ndarray
    separator_id: int
    separator: str
    adds_bos: bool
    tokenizer_sha256: str
    corpus: Corpus
    chat_template_sha256: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the token ids, and of which are scored: equal for two models if they predict the same tokens."""
        digest = hashlib.sha256(self.ids.astype("<i8").tobytes())
        if self.corpus.prompts:
            digest.update(self.document.astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def scored(self) -> np.ndarray:
        """Positions of the tokens of text, ascending: int64 (tokens,)."""
        return np.flatnonzero(self.document >= 0)


@dataclass(frozen=True)
class Protocol:
    """What must be equal for two losses to be comparable; ``data`` is only a name for people."""

    name: str
    context_length: int
    stride: int
    separator: str
    separator_id: int
    bos_each_window: bool
    data: str
    data_sha256: str
    tokens_sha256: str
    tokenizer_sha256: str
    documents: int
    tokens: int
    bytes: int
    words: int
    dtype: str
    resampled: str
    # Length of the prefix before every window, and its hash; 0 and empty without one.
    prefix_tokens: int = 0
    prefix_sha256: str = ""
    # Which tokens of conversations are scored, and the hash of the template that rendered them; empty for plain text.
    chat: str = ""
    chat_template_sha256: str = ""
    # Compiled layers keep more in float32 than eager ones.
    compiled: bool = False

    def differences(self, other: Protocol) -> list[str]:
        """Names of the fields that forbid a comparison with ``other``."""
        # Two copies of a tokenizer or template may differ without changing a token: the hash of the tokens decides.
        free = ("data", "tokenizer_sha256", "chat_template_sha256")
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if name not in free and mine[name] != theirs[name]]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows over a stream, int64 (windows,) each: window ``i`` feeds ``ids[start : start + length]`` and
    scores the targets at positions ``first .. start + length`` that are text."""

    start: np.ndarray
    length: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


def tokenize(
    corpus: Corpus,
    tokenizer: Any,
    *,
    separator: str = "auto",
    cache: Path | None = None,
    chat: ChatTemplate | None = None,
) -> TokenStream:
    """Tokenize a corpus once. ``separator`` is ``auto``, ``bos``, ``eos`` or a token id; ``cache``: a directory
    for the tokens of long texts; ``chat``: what rendered the corpus.

    Raises UsageError when the tokenizer has no such token, or turns the text into no token at all.
    """
    with using(tokenizer):
        separator_id = find_separator(tokenizer, separator)
        ids: list[np.ndarray] = []
        owner: list[np.ndarray] = []
        count = len(corpus.documents)
        encoded = _encoded(corpus, tokenizer, cache)
        prompts = encoded[count:] or [np.empty(0, dtype=np.int64)] * count
        for index, (prompt, text) in enumerate(zip(prompts, encoded, strict=False)):
            ids.append(np.concatenate(([separator_id], prompt, text)))
            owner.append(np.repeat([-1, index], [1 + len(prompt), len(text)]))
        document = np.concatenate(owner).astype(np.int32)
        if not (document >= 0).any():
            raise UsageError(f"the tokenizer turns {corpus.source!r} into no tokens")
        return TokenStream(
            ids=np.concatenate(ids),
            document=document,
            starts=np.cumsum([0, *map(len, ids[:-1])]),
            bytes=np.array([len(d.encode()) for d in corpus.documents], dtype=np.int64),
            # Counted as lm-eval counts them, so that word perplexities agree.
            words=np.array([len(re.split(r"\s+", d)) for d in corpus.documents], dtype=np.int64),
            separator_id=separator_id,
            separator=str(tokenizer.convert_ids_to_tokens(separator_id)),
            adds_bos=_adds_bos(tokenizer),
            tokenizer_sha256=tokenizer_hash(tokenizer),
            corpus=corpus,
            chat_template_sha256=chat.sha256 if chat else "",
        )


def _encoded(corpus: Corpus, tokenizer: Any, cache: Path | None) -> list[np.ndarray]:
    """Token ids of each document, and after them of each prompt, int64."""

    def make() -> list[np.ndarray]:
        return list(_encode([*corpus.documents, *corpus.prompts], tokenizer))

    # Only tokenizers of the tokenizers library serialise completely; one written in Python also depends on its code.
    if (
        cache is None
        or corpus.bytes < tokencache.SMALLEST_TEXT
        or not hasattr(tokenizer, "backend_tokenizer")
    ):
        return make()
    return tokencache.cached_ids(cache, corpus.sha256, tokenizer_hash(tokenizer), make)


def _encode(documents: Sequence[str], tokenizer: Any) -> Iterator[np.ndarray]:
    for at in range(0, len(documents), _TOKENIZE_BATCH):
        batch = list(documents[at : at + _TOKENIZE_BATCH])
        # `verbose=False`: a document longer than the context is normal here, not worth a warning.
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        for encoded in tokenizer(batch, **options)["input_ids"]:
            yield np.array(encoded, dtype=np.int64)


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


def make_protocol(
    stream: TokenStream,
    *,
    dtype: str,
    longest: int | None,
    name: str = PACKED,
    context_length: int | None = None,
    stride: int | None = None,
) -> Protocol:
    """Make the protocol from options. ``longest``: the model's own limit in tokens. A stride below the context makes
    ``packed`` strided.

    Raises UsageError for a context the model cannot take and for a stride that would skip tokens.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol {name!r} is none of {', '.join(PROTOCOLS)}")
    context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT) if context_length is None else context_length
    if context < 2:
        raise UsageError(f"--context-length must be at least 2, not {context}")
    if longest is not None and context > longest:
        raise UsageError(
            f"--context-length {context} is more than the {longest} positions the model was made for",
            f"Use at most {longest}",
        )
    if stride is not None and not 1 <= stride <= context:
        raise UsageError(f"--stride {stride} must lie between 1 and the context length, {context}")
    if name == PACKED and stride is not None and stride < context:
        name = STRIDED
    if name == ROLLING and stride is not None:
        raise UsageError("--stride has no meaning for the rolling protocol", "Leave it out")
    if name == STRIDED and stride is None:
        stride = context // 2
    documents = len(stream.bytes)
    return Protocol(
        name=name,
        context_length=context,
        stride=stride or context,
        separator=stream.separator,
        separator_id=stream.separator_id,
        # Models trained with BOS at position 0 need it in every window; lm-eval's windows have it in the first only.
        bos_each_window=stream.adds_bos and name != ROLLING,
        data=stream.corpus.source,
        data_sha256=stream.corpus.sha256,
        tokens_sha256=stream.sha256,
        tokenizer_sha256=stream.tokenizer_sha256,
        documents=documents,
        tokens=len(stream.scored),
        bytes=int(stream.bytes.sum()),
        words=int(stream.words.sum()),
        dtype=dtype,
        chat=chat_scope(stream),
        chat_template_sha256=stream.chat_template_sha256,
        resampled="documents" if documents >= _FEW_DOCUMENTS else f"segments of {SEGMENT_TOKENS} tokens",
    )


def chat_scope(stream: TokenStream) -> str:
    """Which tokens of conversations are scored: ``all`` or ``completions``; empty for plain text."""
    if not stream.chat_template_sha256:
        return ""
    return "completions" if stream.corpus.prompts else "all"


def make_windows(stream: TokenStream, protocol: Protocol) -> Windows:
    """The windows of a protocol: every position of text is scored in exactly one of them."""
    context = protocol.context_length
    if protocol.name != ROLLING:
        return _with_text(stream, _slide(len(stream.ids) - 1, context, protocol.stride))
    ends = np.append(stream.starts[1:], len(stream.ids)) - 1
    parts = [_roll(int(s), int(e), context) for s, e in zip(stream.starts, ends, strict=True) if e > s]
    start, length, first = (np.concatenate(p) for p in zip(*parts, strict=True))
    return _with_text(stream, Windows(start, length, first))


def _with_text(stream: TokenStream, windows: Windows) -> Windows:
    """The windows that score something: those inside a prompt do not."""
    before = np.concatenate(([0], np.cumsum(stream.document >= 0)))
    kept = before[windows.start + windows.length + 1] > before[windows.first]
    return Windows(windows.start[kept], windows.length[kept], windows.first[kept])


def _slide(last: int, context: int, stride: int) -> Windows:
    """Windows of ``context`` inputs every ``stride`` positions; targets are positions 1 to ``last``."""
    count = max(0, -(-(last - context) // stride)) + 1
    start = np.arange(count, dtype=np.int64) * stride
    end = np.minimum(start + context, last)
    first = np.concatenate(([1], end[:-1] + 1))
    return Windows(start, end - start, first)


def _roll(separator: int, last: int, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """lm-eval's rolling windows of one document: disjoint targets, the last window reaching back for
    context."""
    first = np.arange(separator + 1, last + 1, context, dtype=np.int64)
    end = np.minimum(first + context - 1, last)
    start = np.maximum(end - context, separator)
    return start, end - start, first


def resampling_units(stream: TokenStream, protocol: Protocol) -> np.ndarray:
    """The block each scored token is resampled with: int64 (tokens,), 0 up to the number of blocks,
    ascending."""
    owner = stream.document[stream.scored].astype(np.int64)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(owner)) + 1))
    within = np.arange(len(owner)) - np.repeat(starts, np.diff(np.append(starts, len(owner))))
    fresh = within == 0 if protocol.resampled == "documents" else within % SEGMENT_TOKENS == 0
    unit = np.cumsum(fresh) - 1
    return unit // (unit[-1] // _MOST_UNITS + 1)

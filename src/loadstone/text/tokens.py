"""Divide a stream of tokens into windows that score every token of text exactly once.

The stream is ``[sep] document 0 [sep] document 1 ...``: the separator (BOS where the tokenizer has one,
else EOS) starts every document and is never scored itself. The three protocols cut the same stream and
score the same tokens; they differ only in how much context each token has:

* ``packed``: blocks of ``context_length`` inputs side by side. A block's first token sees one token only.
* ``strided``: a window of ``context_length`` moves by ``stride``; each token but the first ones sees at
  least ``context_length - stride`` others.
* ``rolling``: each document alone, in lm-eval's rolling log-likelihood windows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from loadstone.errors import UsageError
from loadstone.text.stream import TokenStream

PACKED, STRIDED, ROLLING = "packed", "strided", "rolling"
PROTOCOLS = (PACKED, STRIDED, ROLLING)
DEFAULT_CONTEXT = 1024
# With fewer documents than this, segments of them are resampled: so few say little about their spread.
_FEW_DOCUMENTS = 20
SEGMENT_TOKENS = 512
# With more units than this, neighbours are drawn together: the bootstrap would be slower and no better.
_MOST_UNITS = 4096


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
    documents = len(stream.tokens.bytes)
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
        tokens=stream.count,
        bytes=int(stream.tokens.bytes.sum()),
        words=int(stream.tokens.words.sum()),
        dtype=dtype,
        chat=chat_scope(stream),
        chat_template_sha256=stream.chat_template_sha256,
        resampled="documents" if documents >= _FEW_DOCUMENTS else f"segments of {SEGMENT_TOKENS} tokens",
    )


def chat_scope(stream: TokenStream) -> str:
    """Which tokens of conversations are scored: ``all`` or ``completions``; empty for plain text."""
    if not stream.chat_template_sha256:
        return ""
    return "completions" if stream.tokens.prompts.any() else "all"


def make_windows(stream: TokenStream, protocol: Protocol) -> Windows:
    """The windows of a protocol: every position of text is scored in exactly one of them."""
    context = protocol.context_length
    if protocol.name == ROLLING:
        windows = _roll(stream.starts[:-1], stream.starts[1:] - 1, context)
    else:
        windows = _slide(stream.size - 1, context, protocol.stride)
    # Windows inside a prompt score nothing.
    kept = stream.slot(windows.start + windows.length + 1) > stream.slot(windows.first)
    return Windows(windows.start[kept], windows.length[kept], windows.first[kept])


def _slide(last: int, context: int, stride: int) -> Windows:
    """Windows of ``context`` inputs every ``stride`` positions; targets are positions 1 to ``last``."""
    count = max(0, -(-(last - context) // stride)) + 1
    start = np.arange(count, dtype=np.int64) * stride
    end = np.minimum(start + context, last)
    first = np.concatenate(([1], end[:-1] + 1))
    return Windows(start, end - start, first)


def _roll(separator: np.ndarray, last: np.ndarray, context: int) -> Windows:
    """lm-eval's rolling windows of documents between ``separator`` and ``last``, int64 (documents,): disjoint targets,
    the last window of a document reaching back for context."""
    count = -(-(last - separator) // context)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    separator, last = np.repeat(separator, count), np.repeat(last, count)
    first = separator + 1 + within * context
    end = np.minimum(first + context - 1, last)
    start = np.maximum(end - context, separator)
    return Windows(start, end - start, first)


def resampling_units(stream: TokenStream, protocol: Protocol) -> np.ndarray:
    """Where the blocks of tokens that are resampled together begin, and where the last one ends: slots, int64
    (blocks + 1,), ascending."""
    edges = np.unique(stream.slots)
    if protocol.resampled != "documents":
        parts = [np.arange(a, b, SEGMENT_TOKENS) for a, b in pairwise(edges)]
        edges = np.concatenate([*parts, edges[-1:]])
    blocks = len(edges) - 1
    return np.append(edges[:-1][:: (blocks - 1) // _MOST_UNITS + 1], edges[-1])

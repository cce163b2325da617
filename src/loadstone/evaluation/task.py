"""The tokens and windows that all models of an evaluation are scored on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadstone.artifact.context_file import CONTEXT_TENSORS, ContextFile
from loadstone.artifact.formats.safetensors import open_tensors
from loadstone.errors import UsageError
from loadstone.evaluation.models import EvalModel
from loadstone.evaluation.options import DEFAULT_CACHE, Options
from loadstone.evaluation.results.compare import Units, make_units
from loadstone.evaluation.scoring.compiling import compiling_pays
from loadstone.loading import load_tokenizer
from loadstone.loading.model_class import load_config
from loadstone.loading.positions import positions, same_frequencies
from loadstone.progress import Progress, no_progress
from loadstone.text.chat import ChatTemplate
from loadstone.text.corpus import Corpus, read_corpus
from loadstone.text.stream import TokenStream
from loadstone.text.token_cache import SMALLEST_TEXT
from loadstone.text.tokenizing import find_separator, tokenize, tokenizer_hash
from loadstone.text.tokens import (
    PACKED,
    ROLLING,
    STRIDED,
    Protocol,
    Windows,
    make_protocol,
    make_windows,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Task:
    """Tokens, the protocol they are scored by, its windows, and the units that statistics resample."""

    stream: TokenStream
    protocol: Protocol
    windows: Windows
    units: Units
    tokenizer: Any


def make_task(options: Options, subjects: tuple[EvalModel, ...], progress: Progress = no_progress) -> Task:
    """Read and tokenize the text with the reference's tokenizer; ``progress`` counts the bytes of a long one.

    ``options.compile`` None: the protocol says whether compiling pays for this text. Raises UsageError when another
    model of the run tokenizes it differently, or cannot take the context.
    """
    first, trust = subjects[0], options.trust_remote_code
    tokenizer = load_tokenizer(first.plan, trust_remote_code=trust)
    prefix = first.prefix
    separator = options.separator
    if prefix is not None:
        # Every window begins with the prefix, whose last token predicts a document's first.
        if options.protocol == STRIDED or options.stride is not None:
            raise UsageError(
                "after a prefix each document is scored alone", "Leave out --protocol and --stride"
            )
        if separator != "auto":
            raise UsageError("after a prefix no separator is needed", "Leave out --separator")
        if options.chat:
            raise UsageError(
                "--chat: a conversation has its own beginning and does not go on after a prefix",
                "Leave it out",
            )
        options = replace(options, protocol=ROLLING)
        separator = str(last_token(prefix))
    elif options.chat and options.protocol is None:
        # A conversation is read alone, not in what is left of a window.
        options = replace(options, protocol=ROLLING)
    cache = Path(options.cache or DEFAULT_CACHE).expanduser() / "tokens"

    plain = None if options.chat else _read(options, None)

    def stream_of(tokenizer: Any) -> TokenStream:
        chat = _chat(options, tokenizer) if options.chat else None
        corpus = plain or _read(options, chat)
        shown = progress if corpus.bytes >= SMALLEST_TEXT else no_progress
        with shown("tokenizing", corpus.bytes) as step:
            return tokenize(corpus, tokenizer, separator=separator, cache=cache, chat=chat, progress=step)

    stream = stream_of(tokenizer)
    for other in subjects[1:]:
        its = load_tokenizer(other.plan, trust_remote_code=trust)
        same = tokenizer_hash(its) == stream.tokenizer_sha256
        if same and (not options.chat or _chat(options, its).sha256 == stream.chat_template_sha256):
            continue
        if stream_of(its).sha256 != stream.sha256:
            what = "render the conversations" if same else "tokenize the text"
            raise UsageError(
                f"'{first.name}' and '{other.name}' {what} differently: no comparison",
                "Evaluate them one at a time and compare bits_per_byte",
            )
    length = 0 if prefix is None else prefix.facts["prompt"]["tokens"]
    # The prefix's last token is counted as part of the window.
    before = max(length - 1, 0)
    longest = longest_context(subjects, options, before)
    if longest is not None and longest < 2:
        raise UsageError(
            f"the prefix of {length} tokens leaves no room for text",
            "Make a shorter one, or ask for more positions than the model was made for (--context-length)",
        )
    protocol = make_protocol(
        stream,
        dtype=first.plan.dtype,
        longest=longest,
        name=options.protocol or PACKED,
        context_length=options.context_length,
        stride=options.stride,
    )
    if prefix is not None:
        protocol = replace(
            protocol,
            bos_each_window=True,
            prefix_tokens=length,
            prefix_sha256=prefix.facts["prompt"]["sha256"],
        )
    windows = make_windows(stream, protocol)
    compiled = options.compile
    if compiled is None:
        compiled = compiling_pays([subject.plan for subject in subjects], int(windows.length.sum()))
    protocol = replace(protocol, compiled=compiled)
    return Task(stream, protocol, windows, make_units(stream, protocol), tokenizer)


def _read(options: Options, chat: ChatTemplate | None) -> Corpus:
    return read_corpus(
        options.data, column=options.text_column, split=options.split, limit=options.limit, chat=chat
    )


def _chat(options: Options, tokenizer: Any) -> ChatTemplate:
    """What renders conversations. Where the separator is BOS, one that the template writes too is not a second one."""
    bos = tokenizer.bos_token_id
    starts = bos is not None and find_separator(tokenizer, options.separator) == bos
    return ChatTemplate(tokenizer, tokenizer.bos_token if starts else "")


def longest_context(subjects: tuple[EvalModel, ...], options: Options, before: int = 0) -> int | None:
    """The most tokens of a window that all models take after ``before`` others: more than they were made for where
    ``--context-length`` asks for it and their positions can be computed, with a warning."""
    asked = before + (options.context_length or 0)
    limits = []
    for subject in subjects:
        config = load_config(subject.plan.artifact, subject.plan.trust_remote_code)
        limit, extends = positions(config)
        if limit is not None and asked > limit and extends:
            log.warning(
                "%s: --context-length %d is more than the %d positions it was made for: losses beyond them may be high",
                subject.name, asked, limit,
            )  # fmt: skip
            limit = asked
        # Keys and values of a prefix have the frequencies that it was read with.
        most = same_frequencies(config, before + 1) if subject.prefix is not None else None
        limits += [value - before for value in (limit, most) if value is not None]
    return min(limits, default=None)


def last_token(prefix: ContextFile) -> int:
    """The id of the last token of a prefix."""
    with open_tensors(prefix.path / CONTEXT_TENSORS, "numpy") as handle:
        return int(handle.get_tensor("tokens")[0, -1])

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
from loadstone.loading import load_tokenizer
from loadstone.loading.model_class import load_config, positions
from loadstone.text.corpus import read_corpus
from loadstone.text.tokens import (
    ROLLING,
    STRIDED,
    Protocol,
    TokenStream,
    Windows,
    make_protocol,
    make_windows,
    tokenize,
    tokenizer_hash,
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


def make_task(options: Options, subjects: tuple[EvalModel, ...]) -> Task:
    """Read and tokenize the text with the reference's tokenizer. Raises UsageError when another model of
    the run tokenizes it differently, or cannot take the context."""
    corpus = read_corpus(options.data, column=options.text_column, split=options.split, limit=options.limit)
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
        options = replace(options, protocol=ROLLING)
        separator = str(last_token(prefix))
    cache = Path(options.cache or DEFAULT_CACHE).expanduser() / "tokens"
    stream = tokenize(corpus, tokenizer, separator=separator, cache=cache)
    for other in subjects[1:]:
        its = load_tokenizer(other.plan, trust_remote_code=trust)
        if tokenizer_hash(its) == stream.tokenizer_sha256:
            continue
        if tokenize(corpus, its, separator=separator, cache=cache).sha256 != stream.sha256:
            raise UsageError(
                f"'{first.name}' and '{other.name}' tokenize the text differently: no comparison",
                "Evaluate them one at a time and compare bits_per_byte",
            )
    longest = longest_context(subjects, options)
    length = 0 if prefix is None else prefix.facts["prompt"]["tokens"]
    if prefix is not None and longest is not None:
        # The prefix's last token is counted as part of the window.
        longest -= length - 1
        if longest < 2:
            raise UsageError(f"the prefix of {length} tokens leaves no room for text", "Make a shorter one")
    protocol = make_protocol(
        stream,
        dtype=first.plan.dtype,
        longest=longest,
        name=options.protocol,
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
    return Task(stream, protocol, make_windows(stream, protocol), make_units(stream, protocol), tokenizer)


def longest_context(subjects: tuple[EvalModel, ...], options: Options) -> int | None:
    """The most tokens that all models take: more than they were made for where ``--context-length`` asks for it and
    their positions can be computed, with a warning."""
    asked = options.context_length or 0
    limits = []
    for subject in subjects:
        limit, extends = positions(load_config(subject.plan.artifact, subject.plan.trust_remote_code))
        if limit is None:
            continue
        if asked > limit and extends and subject.prefix is None:
            log.warning(
                "%s: --context-length %d is more than the %d positions it was made for: losses beyond them may be high",
                subject.name, asked, limit,
            )  # fmt: skip
            limit = asked
        limits.append(limit)
    return min(limits, default=None)


def last_token(prefix: ContextFile) -> int:
    """The id of the last token of a prefix."""
    with open_tensors(prefix.path / CONTEXT_TENSORS, "numpy") as handle:
        return int(handle.get_tensor("tokens")[0, -1])

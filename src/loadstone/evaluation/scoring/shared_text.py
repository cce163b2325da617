"""Score documents separately, computing the tokens that several begin with once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loadstone.evaluation.scoring.beginnings import Beginnings
from loadstone.evaluation.scoring.common import SHORTEST, common_prefixes, overhead
from loadstone.evaluation.scoring.losses import BatchMaker, Timing, Values, plan_batches, score
from loadstone.text.stream import TokenStream
from loadstone.text.tokens import ROLLING, Protocol, Windows

log = logging.getLogger(__name__)
_FEWEST = 4


def score_shared(
    model: Any,
    maker: BatchMaker,
    batches: Sequence[np.ndarray],
    size: int,
    stream: TokenStream,
    protocol: Protocol,
    *,
    name: str,
    values: Values | None = None,
    share: tuple[int, int] = (0, 1),
    **options: Any,
) -> tuple[Values, Timing]:
    """`score`, with common prefixes of windows computed once; plain `score` if there are none.

    Tokens of a common prefix get the same losses in every document; the rest of each document is scored after it.
    ``size``: windows in a batch; the other arguments are `score`'s."""
    windows = maker.windows
    # A streamed model, or one after a prefix already, is not an nn.Module.
    plain = isinstance(model, torch.nn.Module)
    groups = [] if not plain else _groups(stream, protocol, windows, maker.device)
    if not groups:
        return score(model, maker, batches, name=name, values=values, share=share, **options)
    seconds, tokens = 0.0, 0
    beginnings = Beginnings(model)
    left = np.ones(len(windows), dtype=bool)
    for length, members in groups:
        start = windows.start[members]
        longest = members[int(np.argmax(windows.length[members]))]
        own = stream.ids_at(windows.start[longest] + np.arange(windows.length[longest]))
        cache = beginnings.read(own[:length].tolist(), own[length:].tolist())
        if cache is None:
            break
        log.info(
            "%s: computing the %d documents' common prefix of %d tokens once", name, len(members), length
        )
        if share[0] == 0:
            # Only one process scores the prefix: otherwise its tokens would be counted several times.
            leader = start[:1]
            values, timing = _part(
                model, maker, Windows(leader, np.full(1, length - 1), leader + 1), size,
                name=name, values=values, **options,
            )  # fmt: skip
            seconds, tokens = seconds + timing.seconds, tokens + timing.tokens
            # Of a prompt in the beginning nothing is scored.
            places = 1 + np.flatnonzero(stream.is_text(start[0] + np.arange(1, length)))
            theirs = stream.slot(start[:, None] + places)
            for losses in values.values() if len(places) else ():
                losses[theirs] = losses[theirs[0]]
        rest = Windows(start + length - 1, windows.length[members] - (length - 1), start + length)
        values, timing = _part(
            beginnings.after(cache), maker, rest, size, name=name, values=values, share=share, **options
        )
        seconds, tokens = seconds + timing.seconds, tokens + timing.tokens
        left[members] = False
    others = Windows(windows.start[left], windows.length[left], windows.first[left])
    if len(others):
        values, timing = _part(model, maker, others, size, name=name, values=values, share=share, **options)
        seconds, tokens = seconds + timing.seconds, tokens + timing.tokens
    assert values is not None
    return values, Timing(seconds, tokens)


def _part(
    model: Any, maker: BatchMaker, windows: Windows, size: int, **options: Any
) -> tuple[Values, Timing]:
    part = copy.copy(maker)
    part.windows = windows
    return score(model, part, plan_batches(windows, size), **options)


def _groups(
    stream: TokenStream, protocol: Protocol, windows: Windows, device: torch.device
) -> list[tuple[int, np.ndarray]]:
    """(length, windows) of each common prefix of documents' first windows."""
    if protocol.name != ROLLING or protocol.bos_each_window:
        return []
    firsts = np.flatnonzero(windows.first == windows.start + 1)
    if len(firsts) < _FEWEST:
        return []
    # A document whose beginning no other has is in no group.
    enough = firsts[windows.length[firsts] > SHORTEST]
    beginnings = _marked(stream, windows.start[enough][:, None] + np.arange(SHORTEST))
    _, same, count = np.unique(beginnings, axis=0, return_inverse=True, return_counts=True)
    alike = enough[count[same.reshape(-1)] > 1]
    rows = [_marked(stream, windows.start[i] + np.arange(windows.length[i])).tolist() for i in alike]
    return [(g.length, alike[list(g.members)]) for g in common_prefixes(rows, overhead(device))]


def _marked(stream: TokenStream, positions: np.ndarray) -> np.ndarray:
    """Tokens, and whether they are scored: a common beginning is alike in both."""
    ids, is_text = stream.read(positions)
    return 2 * ids + is_text

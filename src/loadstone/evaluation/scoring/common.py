"""Groups of requests that begin with the same tokens, such as few-shot prompts, so that these are computed once.

The values are those of reading every request whole; kernels add in another order, as they do for another batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

# A shorter common prefix is not worth a pass of its own.
SHORTEST = 16
# Tokens that a separate pass over a prefix must save to pay off: on a GPU such a pass leaves the batch unfilled.
_OVERHEAD = {"cpu": 512, "cuda": 32768}
# Recursion limit of nested groups.
_DEEPEST = 64


@dataclass(frozen=True)
class Group:
    """Requests, by number, that share their first ``length`` tokens."""

    length: int
    members: tuple[int, ...]


def overhead(device: torch.device) -> int:
    """The cost, in tokens, of a separate pass over a prefix on a device."""
    return _OVERHEAD.get(device.type, _OVERHEAD["cuda"])


def common_prefixes(rows: Sequence[Sequence[int]], cost: int) -> list[Group]:
    """Disjoint groups of token rows that save tokens, each group's saving being ``(members - 1) * length - cost``; rows
    in no group are read whole.

    Sorted rows that share a beginning lie side by side. A run of them is divided where neighbours share least; each
    part joins the run's own group, or keeps its longer ones where these save more. At least one token is left of each
    row.
    """
    order = sorted(range(len(rows)), key=lambda i: list(rows[i]))
    shared = [_shared(rows[a], rows[b]) for a, b in pairwise(order)]
    return _best(order, shared, 0, len(order), cost, 0)[1]


def _best(
    order: list[int], shared: list[int], low: int, high: int, cost: int, depth: int
) -> tuple[int, list[Group]]:
    """(tokens saved, groups) of the sorted rows ``low`` up to ``high``."""
    if high - low < 2:
        return 0, []
    least = min(shared[low : high - 1])
    length = least if least >= SHORTEST else 0
    # Prefixes too short to matter are all cut at once.
    bar = max(least, SHORTEST - 1)
    cuts = [low, *(i + 1 for i in range(low, high - 1) if shared[i] <= bar), high]
    joined: list[int] = []
    groups: list[Group] = []
    total, together = 0, -length - cost
    for start, end in pairwise(cuts):
        gain, own = (0, []) if depth == _DEEPEST else _best(order, shared, start, end, cost, depth + 1)
        total += gain
        groups += own
        if (end - start) * length > gain:
            together += (end - start) * length
            joined += order[start:end]
        else:
            together += gain
    if together <= total:
        return total, groups
    gone = set(joined)
    kept = [group for group in groups if group.members[0] not in gone]
    return together, [*kept, Group(length, tuple(sorted(joined)))]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two rows, leaving at least one token of each."""
    return min(_alike(a, b), len(a) - 1, len(b) - 1)


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    # Slices compare in C: halving beats a loop over thousands of tokens.
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low if a[low] != b[low] else low + 1

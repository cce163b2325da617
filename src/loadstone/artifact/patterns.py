"""Regular expressions from people and files: which of them could take for ever on a short name."""

from __future__ import annotations

import re
from typing import Any

# A repeat of this many times or more counts as one without end.
_MANY = 16
_MOST_REPEATS = 4


def may_not_end(pattern: str) -> bool:
    """Whether a valid regular expression repeats within a repeat, or repeats more than four times.

    Only those take time that grows fast with the length of the name, which Python's `re` cannot be stopped in.
    """
    # The parser is not public: its form has been the same since Python 2.
    count, nested = _repeats(re._parser.parse(pattern), False)  # type: ignore[attr-defined]
    return nested or count > _MOST_REPEATS


def _repeats(parsed: Any, inside: bool) -> tuple[int, bool]:
    """How many open-ended repeats there are, and whether one lies within another."""
    if (
        isinstance(parsed, tuple)
        and len(parsed) == 3
        and isinstance(parsed[0], int)
        and isinstance(parsed[1], int)
    ):
        many = parsed[1] >= _MANY
        count, nested = _repeats(parsed[2], inside or many)
        return count + many, nested or (many and inside)
    if isinstance(parsed, (list, tuple)) or hasattr(parsed, "data"):
        found = [_repeats(part, inside) for part in getattr(parsed, "data", parsed)]
        return sum(count for count, _ in found), any(nested for _, nested in found)
    return 0, False

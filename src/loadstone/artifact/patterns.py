"""Regular expressions from people and files: which of them are none, or could take for ever on a short name."""

from __future__ import annotations

import re
from typing import Any

# A repeat of this many times or more counts as one without end.
_MANY = 16
_MOST_REPEATS = 4


def unsound(pattern: str) -> str:
    """What is wrong with a regular expression, to follow its text in a message; empty for a sound one."""
    try:
        re.compile(pattern)
        return "could take for ever" if may_not_end(pattern) else ""
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({str(error)[:200]})"


def may_not_end(pattern: str) -> bool:
    """Whether a valid regular expression repeats a choice or a repeat, or repeats more than four times.

    Only those take time that grows fast with the length of the name, which Python's `re` cannot be stopped in.
    """
    # The parser is not public: its form has been the same since Python 2.
    count, nested = _repeats(re._parser.parse(pattern), False)  # type: ignore[attr-defined]
    return nested or count > _MOST_REPEATS


def _repeats(parsed: Any, inside: bool) -> tuple[int, bool]:
    """How many open-ended repeats there are, and whether something that matches in several ways lies within one."""
    if (
        isinstance(parsed, tuple)
        and len(parsed) == 3
        and isinstance(parsed[0], int)
        and isinstance(parsed[1], int)
    ):
        many = parsed[1] >= _MANY
        count, nested = _repeats(parsed[2], inside or many)
        return count + many, nested or (inside and parsed[0] != parsed[1])
    if isinstance(parsed, tuple) and str(parsed[:1]) == "(BRANCH,)" and inside:
        return 0, True
    if isinstance(parsed, (list, tuple)) or hasattr(parsed, "data"):
        found = [_repeats(part, inside) for part in getattr(parsed, "data", parsed)]
        return sum(count for count, _ in found), any(nested for _, nested in found)
    return 0, False

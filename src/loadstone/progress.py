"""How the library reports the progress of long work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

# Called as on_progress(stage, done, total).
OnProgress = Callable[[str, int, int], None]
CALIBRATE, WRITE, VERIFY = "calibrate", "write", "verify"


def reporter(on_progress: OnProgress | None, stage: str, total: int) -> Callable[[int], None] | None:
    """A callback that adds up the counts it is called with and reports the sum; None where nobody listens."""
    if on_progress is None:
        return None
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(stage, done, total)

    return advance


# Opens a progress bar: called as progress(label, total), it yields a callback that is called with counts.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def no_progress(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar that shows nothing."""
    return nullcontext(lambda step: None)

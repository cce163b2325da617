"""stdout and stderr that may be closed, full, gone or narrow without losing a result or changing an exit code."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

# The reader left, the terminal was closed, or nothing was ever open: nobody wants the output.
_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF)


class _Stream(io.FileIO):
    """A standard stream that drops what cannot be written. ``lost``: the first error that somebody should hear of,
    such as a full disk behind ``> result.json``."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        try:
            while (written := super().write(data)) is None:
                # Another program that shares the terminal has made it non-blocking.
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            if error.errno not in _NOBODY_READS:
                self.lost = self.lost or error
            return size


def protect() -> None:
    """Replace stdout and stderr, unless a caller already did, by streams that no writing to them can break.

    Characters that their encoding lacks are replaced. Closed streams lead to /dev/null, so that no file that is opened
    later gets their number and with it the output of a library.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is given.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _protected(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _protected(2, sys.stderr)


def _protected(number: int, stream: TextIO | None) -> TextIO:
    raw = _Stream(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="replace",
        line_buffering=number == 2 or raw.isatty(),
    )


def lost_output() -> OSError | None:
    """Why output to stdout was lost, where somebody was to read it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # A stream of the caller's.
        return None if error.errno in _NOBODY_READS else error
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Stream) else None

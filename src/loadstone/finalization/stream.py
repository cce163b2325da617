"""Units of a finalize through a few threads: each reads its part of a source tensor and hands on what becomes of it.

A thread holds one block of rows at a time, so memory does not follow the size of tensors, but where a recipe needs a
tensor whole: such tensors are quantized one at a time, while the next is read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadstone.finalization.pieces import Unit, made
from loadstone.finalization.plan import FinalizePlan
from loadstone.loading.source import SourceReader

if TYPE_CHECKING:
    import torch

# A GPU is one: more threads only keep it fed.
_GPU_WORKERS = 4
_MOST_WORKERS = 8


def stream(
    plan: FinalizePlan,
    units: Iterable[Unit],
    reader: SourceReader,
    device: str,
    put: Callable[[Unit, str, torch.Tensor, int], None],
) -> Generator[Unit, None, None]:
    """Work through ``units`` of ``plan`` and yield each when it and all before it are done.

    ``put`` is told each part that a unit makes (stored tensor's name, the part, its byte offset), from any thread. In
    memory at once are at most twice the largest source tensor's bytes, and what is being made of them.
    """
    import torch

    threads = torch.get_num_threads()
    held = _Room(2 * max((info.nbytes for step in plan.steps for info in step.sources), default=0))
    alone = threading.Lock()
    # Page-locked blocks are kept by torch for the next unit: fresh memory costs more than the copy into it.
    pinned = device.startswith("cuda")

    def work(unit: Unit) -> Unit:
        with held.taken(unit.nbytes), torch.no_grad():
            values = reader.span(
                unit.step.sources[unit.number], unit.start, unit.stop, pinned=pinned and not unit.large
            )
            parts = made(unit, values, device)
            if not unit.large:
                for part in parts:
                    put(unit, *part)
                return unit
            with alone:
                torch.set_num_threads(threads)
                try:
                    whole = list(parts)
                finally:
                    torch.set_num_threads(1)
            for part in whole:
                put(unit, *part)
        return unit

    count = _GPU_WORKERS if pinned else min(max(threads, 2), _MOST_WORKERS)
    try:
        # Blocks are too small for more than one thread each: several would wait for each other longer than they work.
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ahead: deque[Future[Unit]] = deque()
            try:
                for unit in units:
                    ahead.append(pool.submit(work, unit))
                    if len(ahead) > 2 * count:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)


class _Room:
    """A number of bytes that may be held at once, given out in turn."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._turn = threading.Lock()
        self._change = threading.Condition()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        nbytes = min(nbytes, self._size)
        # Whoever waits for much is not overtaken by those who need little.
        with self._turn, self._change:
            self._change.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._change:
                self._free += nbytes
                self._change.notify()

"""A thread pool for the units of a finalize: each worker reads a unit, encodes it and passes the result to `put`.

A thread holds one block of rows at a time, so memory does not grow with tensors. Tensors that have to be quantized
whole are quantized one at a time, while the next is read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from loadstone.artifact import Source, TensorInfo
from loadstone.finalization.plan import FinalizePlan
from loadstone.finalization.units import Unit, encode_unit, extremes_of

if TYPE_CHECKING:
    import torch

# A GPU needs only enough threads to keep it busy.
_GPU_WORKERS = 4
_MOST_WORKERS = 8


def stream(
    plan: FinalizePlan,
    units: Iterable[Unit],
    reader: Source,
    device: str,
    put: Callable[[Unit, str, torch.Tensor, int], None],
) -> Generator[Unit, None, None]:
    """Encode ``units`` of ``plan`` and yield each when it and all before it are done.

    ``put(unit, name, part, offset)`` is called from any thread for each encoded part of a stored tensor. At most twice
    the largest source tensor's bytes are in memory at once, and what they are encoded to.
    """
    import torch

    threads = torch.get_num_threads()
    budget = _MemoryBudget(2 * max((info.nbytes for step in plan.steps for info in step.sources), default=0))
    alone = threading.Lock()
    # torch reuses page-locked blocks for later units: allocating memory costs more than copying into it.
    pinned = device.startswith("cuda")

    @lru_cache(maxsize=64)
    def extremes(info: TensorInfo) -> tuple[torch.Tensor, torch.Tensor]:
        return extremes_of(info, reader)

    def work(unit: Unit) -> Unit:
        with budget.reserve(unit.nbytes), torch.no_grad():
            values = reader.read(
                unit.step.sources[unit.number], unit.start, unit.stop, pinned=pinned and not unit.large
            )
            others = (extremes(info) for info in unit.step.merged_with)
            parts = encode_unit(unit, values, device, others)
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
        # Blocks are small: several torch threads a block would mostly wait for each other.
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


class _MemoryBudget:
    """Bytes that all threads together may hold. First come, first served, so that large requests are not starved."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._turn = threading.Lock()
        self._change = threading.Condition()

    @contextmanager
    def reserve(self, nbytes: int) -> Iterator[None]:
        nbytes = min(nbytes, self._size)
        with self._turn, self._change:
            self._change.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._change:
                self._free += nbytes
                self._change.notify()

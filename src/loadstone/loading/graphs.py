"""Functions of tensors as CUDA graphs: launching hundreds of small kernels takes a GPU longer than computing them.

A graph repeats the same kernels on the same memory, so the numbers are those of the function itself, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
# A graph holds the memory of its activations until it is dropped.
_MOST_GRAPHS = 8


@dataclass(frozen=True, eq=False)
class Graph:
    """``replay()`` computes ``outputs`` again, in the same memory, from what the function's tensors hold by then."""

    graph: Any
    outputs: tuple[Tensor, ...]

    def replay(self) -> tuple[Tensor, ...]:
        self.graph.replay()
        return self.outputs


@contextmanager
def put_back(tensors: Sequence[Tensor]) -> Iterator[None]:
    """After the block, ``tensors`` hold what they held before it."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)


def capture(
    function: Callable[[], tuple[Tensor, ...]], device: torch.device, *, changes: Sequence[Tensor] = ()
) -> Graph | None:
    """A graph of ``function``; None where it cannot be captured (it asks the host for a value), or gives other values
    when it is repeated (it draws random numbers).

    What the function reads must stay where it is in memory; numbers of the host are those of the capture. ``changes``:
    tensors that it writes besides its outputs; afterwards they hold what they held before.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Libraries allocate their work space, and kernels are compiled, in a first call on a stream.
        with torch.cuda.stream(stream), put_back(changes):
            expected = tuple(output.clone() for output in function())
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.graphsafe_get_state()
        try:
            # A capture that fails leaves the state it found unusable.
            generator.graphsafe_set_state(generator.clone_state())
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = function()
        except RuntimeError as error:
            log.debug("not captured: %s", error)
            return None
        finally:
            generator.graphsafe_set_state(state)
        captured = Graph(graph, outputs)
        with put_back(changes):
            found = captured.replay()
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, found, strict=True)):
        log.debug("not captured: repeated, the function gives other values")
        return None
    return captured


class Captured:
    """``function`` of tensors, which gives tensors: from the second call with some shapes on, a graph's replay.

    On a CPU, and where the function cannot be captured, it is called. See `capture` for what it may read.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graphs: dict[tuple[Any, ...], tuple[Graph, tuple[Tensor, ...]] | None] = {}
        self._capturable = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(each.detach() for each in inputs)
        if not inputs[0].is_cuda or not self._capturable:
            return self._function(*inputs)
        key = tuple((each.shape, each.dtype, each.device) for each in inputs)
        if self._graphs.get(key) is None:
            if key not in self._graphs:
                # Most shapes come once.
                if len(self._graphs) < _MOST_GRAPHS:
                    self._graphs[key] = None
                return self._function(*inputs)
            static = tuple(each.clone() for each in inputs)
            made = capture(partial(self._function, *static), inputs[0].device)
            if made is None:
                self._capturable = False
                return self._function(*inputs)
            self._graphs[key] = made, static
        found = self._graphs[key]
        assert found is not None
        graph, static = found
        for own, given in zip(static, inputs, strict=True):
            own.copy_(given)
        return tuple(output.clone() for output in graph.replay())

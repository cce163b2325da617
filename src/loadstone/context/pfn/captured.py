"""A function of query rows and its gradient as one CUDA graph: launching its hundreds of kernels takes a GPU ten times
as long as computing them.

A graph repeats the same kernels on the same shapes, so there is one for each number of rows, and the numbers are those
of the function itself, bit for bit. On a CPU, and where a function cannot be captured (it asks the host for a value),
the function is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
# A graph holds the memory of its activations until it is dropped.
_MOST_GRAPHS = 8


@dataclass(frozen=True, eq=False)
class _Graph:
    """``replay`` reads ``rows`` and writes ``values`` and ``gradient``, always in the same memory."""

    graph: Any
    rows: Tensor
    values: Tensor
    gradient: Tensor

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.copy_(rows)
        self.graph.replay()
        return self.values.clone(), self.gradient.clone()


class CapturedGradient:
    """Values (m,) and gradients (m, d) of ``function``, which maps rows (m, d) to values, each by its own row alone.

    The second call with a shape captures it. What the function reads besides its rows must stay where it is in memory
    and is read anew each time; numbers of the host are those of the capture.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._graphs: dict[tuple[Any, ...], _Graph | None] = {}
        self._capturable = True

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.detach()
        if not rows.is_cuda or not self._capturable:
            return self._compute(rows)
        key = (rows.shape, rows.dtype, rows.device)
        graph = self._graphs.get(key)
        if graph is not None:
            return graph(rows)
        if key in self._graphs:
            self._graphs[key] = graph = self._capture(rows)
            if graph is not None:
                return graph(rows)
        elif len(self._graphs) < _MOST_GRAPHS:
            self._graphs[key] = None
        return self._compute(rows)

    def _compute(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            values = self._function(leaf)
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradient

    def _capture(self, rows: Tensor) -> _Graph | None:
        """A graph that gives what the function gives for ``rows``; None where there is none."""
        with torch.cuda.device(rows.device):
            static, stream = rows.clone(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Libraries allocate their work space in a first call on a stream.
            with torch.cuda.stream(stream):
                expected = self._compute(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            state = generator.graphsafe_get_state()
            try:
                # A capture that fails leaves the state it found unusable.
                generator.graphsafe_set_state(generator.clone_state())
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    values, gradient = self._compute(static)
            except RuntimeError as error:
                log.debug("not captured: %s", error)
                self._capturable = False
                return None
            finally:
                generator.graphsafe_set_state(state)
            captured = _Graph(graph, static, values, gradient)
            found = captured(rows)
        # A function that draws random numbers, say, gives others when it is repeated.
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, found, strict=True)):
            log.debug("not captured: repeated, the function gives other values")
            self._capturable = False
            return None
        return captured


class CapturedValue(torch.autograd.Function):
    """Values (m,) of a `CapturedGradient` under autograd, for optimisers that ask for gradients that way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, function: CapturedGradient) -> Tensor:
        values, gradient = function(rows)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return slopes.unsqueeze(-1).to(gradient.dtype) * gradient, None

"""A function of query rows and its gradient as one CUDA graph for each number of rows: the numbers of the function
itself, bit for bit, an order of magnitude sooner where there are few rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loadstone.loading.graphs import Captured


class CapturedGradient(Captured):
    """Values (m,) and gradients (m, d) of ``function``, which maps rows (m, d) to values, each by its own row alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(partial(_with_gradient, function))


def _with_gradient(function: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    leaf = rows.detach().requires_grad_()
    with torch.enable_grad():
        values = function(leaf)
        (gradient,) = torch.autograd.grad(values, leaf, torch.ones_like(values))
    return values.detach(), gradient


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

"""The decoder layers of a model run one after the other, for calibration: each layer's inputs and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from loadstone.errors import ArtifactError
from loadstone.loading.language_model import on_token_ids
from loadstone.ranks import Ranks

if TYPE_CHECKING:
    import torch
    from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
PLAIN = "Use a rounding that needs no text: affine, mse or hqq"


def layer_calls(
    base: Any, layers: nn.ModuleList, rows: torch.Tensor, device: str, ranks: Ranks, remedy: str = PLAIN
) -> tuple[list[torch.Tensor], list[Call]]:
    """The inputs of the first layer for this rank's share of the ``rows`` of token ids, every size-th, and the
    arguments of each layer's call (masks, positions).

    Each layer's forward is replaced by one that records its call and returns its input, so no layer needs weights.
    Raises `ArtifactError`, with ``remedy``, for a model that does not take token ids alone or does not run its layers
    one after the other.
    """
    mine = rows[ranks.rank :: ranks.size]
    calls: list[Call] = []
    entered: list[torch.Tensor] = []

    def record(number: int) -> Callable[..., Any]:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if number == 0:
                entered.append(x.cpu())
            if number == len(calls):
                calls.append((args, kwargs))
            return x

        return forward

    for number, layer in enumerate(layers):
        layer.forward = record(number)  # type: ignore[method-assign]
    name = type(base).__name__
    try:
        with on_token_ids(lambda why: ArtifactError(f"no text can be given to {name}: it {why}", remedy)):
            # A rank without rows has to know the calls.
            for row in mine if len(mine) else rows[:1]:
                base(input_ids=row[None].to(device), use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    if len(calls) != len(layers):
        raise ArtifactError(f"{name} does not run its layers one after the other", remedy)
    return entered[: len(mine)], calls


def run_layer(layer: nn.Module, x: torch.Tensor, call: Call, device: str) -> torch.Tensor:
    """The hidden states (1, length, width) after ``layer``, on the CPU."""
    result = layer(x.to(device), *call[0], **call[1])
    return (result[0] if isinstance(result, tuple) else result).cpu()

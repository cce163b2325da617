"""The decoder layers of a model run one after the other, for calibration: each layer's inputs and arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from loadstone.errors import ArtifactError
from loadstone.loading.language_model import on_token_ids
from loadstone.ranks import Ranks

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)
Call = tuple[tuple[Any, ...], dict[str, Any]]
PLAIN = "Use a rounding that needs no text: affine, mse or hqq"
# The share of a GPU's free memory that the inputs of a layer may take; larger ones are kept on the CPU.
_STAYS = 1 / 16


def layer_calls(
    base: Any, layers: nn.ModuleList, rows: torch.Tensor, device: str, ranks: Ranks, remedy: str = PLAIN
) -> tuple[list[torch.Tensor], list[Call]]:
    """The inputs of the first layer for this rank's share of the ``rows`` of token ids, every size-th, on ``device``
    where they are small beside its memory, else on the CPU; and the arguments of each layer's call (masks, positions).

    Each layer's forward is replaced by one that records its call and returns the first one's input, so no layer needs
    weights. Raises `ArtifactError`, with ``remedy``, for a model that does not take token ids alone or does not run its
    layers one after the other.
    """
    mine = rows[ranks.rank :: ranks.size]
    calls: list[Call] = []
    entered: list[torch.Tensor] = []
    first: list[torch.Tensor] = []

    def record(number: int) -> Callable[..., Any]:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if number == 0:
                first[:] = [x]
                entered.append(x if _stays(x, len(mine)) else x.cpu())
            if number == len(calls):
                calls.append((args, kwargs))
            # Models that take the first of what a layer returns find its one row here, and give that to the next.
            return first[0]

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
    """The hidden states (1, length, width) after ``layer``, where those before it, ``x``, are."""
    result = layer(x.to(device), *call[0], **call[1])
    return (result[0] if isinstance(result, tuple) else result).to(x.device)


def _stays(x: torch.Tensor, count: int) -> bool:
    """Whether ``count`` rows like ``x`` stay on its device."""
    import torch

    return x.is_cuda and count * x.nbytes < _STAYS * torch.cuda.mem_get_info(x.device)[0]


class Laps:
    """How long the steps of some work take, for the log."""

    def __init__(self, device: str) -> None:
        self._device, self._said = device, ""
        self._start = self._last = self._now()

    def lap(self, step: str) -> None:
        """``step`` ends now."""
        now = self._now()
        self._said += f"{', ' if self._said else ''}{step} {now - self._last:.2f} s"
        self._last = now

    def __str__(self) -> str:
        return f"{self._said}, in all {self._last - self._start:.2f} s"

    def _now(self) -> float:
        import torch

        if self._device.startswith("cuda") and log.isEnabledFor(logging.DEBUG):
            # What was launched has not been computed.
            torch.cuda.synchronize(self._device)
        return monotonic()

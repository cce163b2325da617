"""Models larger than memory: all batches of a round pass through one layer before the next layer is read.

Weights are read once a round instead of once a batch, and two layers are held at a time (one computes while
the next is read). The operations are those of the resident model in the same order, so the numbers are too.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loadstone.artifact.detect import FAKEQUANT
from loadstone.evaluation.fast.replace import FastPath, speed_up, speed_up_layer
from loadstone.evaluation.measure import free_bytes
from loadstone.evaluation.scoring.head import SplitModel, flat_attention, split_unchecked
from loadstone.loading import LoadPlan
from loadstone.loading.placement import weight_bytes
from loadstone.loading.plan import NATIVE, NATIVE_QUANTIZED, NATIVE_UNPACKED
from loadstone.loading.streamed import StreamedModel

log = logging.getLogger(__name__)
# Of free memory: for the hidden states of a round; and what weights may take before they are streamed.
_STATES_SHARE, _WEIGHTS_SHARE = 0.25, 0.8
# Seconds between log lines on the progress of a round: the bar moves at its end only.
_LOG_EVERY = 20.0
Call = tuple[tuple[Any, ...], dict[str, Any]]


class StreamedLm:
    """A causal language model whose layers are read one at a time. ``together``: the number of batches in a round."""

    def __init__(self, source: StreamedModel, *, fast: bool) -> None:
        self.source = source
        self.config = source.model.config
        self._fast = fast
        self.fast = speed_up(source.model) if fast else FastPath()
        self.together = 1
        self._base = source.model.base_model
        split = split_unchecked(source.model, self._base)
        self._backbone = split.backbone
        self.split_model = SplitModel(lambda ids: next(self.hidden([ids])), split.head, False, self.hidden)
        self._tuples = False
        self._counted: set[int] = set()
        self._seen: dict[torch.Size, list[Call]] = {}

    def get_input_embeddings(self) -> Any:
        return self.source.model.get_input_embeddings()

    def plan_round(self, tokens: int, models: int) -> None:
        """Choose how many batches of ``tokens`` each go into a round, with ``models`` - 1 other models in memory."""
        row = self.config.get_text_config().hidden_size * self.get_input_embeddings().weight.element_size()
        room = _STATES_SHARE * free_bytes(self.source.device)
        self.together = max(1, int(room / (tokens * row * models)))

    def hidden(self, many: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Hidden states (B, L, H) for each of the ids (B, L), layer by layer for all of them."""
        states, calls = zip(*(self._enter(ids) for ids in many), strict=True)
        now = list(states)
        logged = time.perf_counter()
        with ThreadPoolExecutor(1) as pool, flat_attention():
            coming = pool.submit(self._layer, 0)
            for index in range(len(self.source)):
                layer = coming.result()
                if index + 1 < len(self.source):
                    coming = pool.submit(self._layer, index + 1)
                for batch, call in enumerate(calls):
                    args, kwargs = call[index]
                    out = layer(now[batch], *args, **kwargs)
                    self._tuples = isinstance(out, tuple)
                    now[batch] = out[0] if self._tuples else out
                del layer
                if time.perf_counter() - logged > _LOG_EVERY:
                    logged = time.perf_counter()
                    log.info("layer %d of %d, %d batches", index + 1, len(self.source), len(now))
        for batch, ids in enumerate(many):
            yield self._leave(ids, now[batch])
            now[batch] = ids  # frees the states

    def _layer(self, index: int) -> nn.Module:
        layer = self.source.layer(index)
        if self._fast:
            counted = speed_up_layer(layer, like=self.get_input_embeddings().weight)
            if index not in self._counted:
                self._counted.add(index)
                self.fast = self.fast + counted
        return layer

    def _enter(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """The hidden states (B, L, H) that enter the first layer, and the other arguments of each layer: recorded from
        the model's own forward, with layers that only record and pass on."""
        calls: list[Call] = []
        first: list[torch.Tensor] = []

        def note(index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
            state: torch.Tensor
            state, args = (kwargs.pop("hidden_states"), args) if not args else (args[0], args[1:])
            first.append(state)
            calls.append((args, kwargs))
            return state

        with _replaced_layers(self.source.stack, note):
            self._backbone(ids)
        known = self._seen.setdefault(ids.shape, calls)
        # Masks and position embeddings of one shape are usually equal for all batches: store them once.
        return first[0], known if known is calls or _same(known, calls) else calls

    def _leave(self, ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The backbone's output for the last layer's output ``state``: its own forward, with layers that return it."""

        def replace_forward(index: int, *args: Any, **kwargs: Any) -> Any:
            return (state,) if self._tuples else state

        with _replaced_layers(self.source.stack, replace_forward):
            return self._backbone(ids)


@contextmanager
def _replaced_layers(stack: nn.ModuleList, replace_forward: Any) -> Iterator[None]:
    # An instance attribute shadows the class's forward.
    for index, layer in enumerate(stack):
        layer.forward = lambda *args, _index=index, **kwargs: replace_forward(_index, *args, **kwargs)
    try:
        yield
    finally:
        for layer in stack:
            del layer.forward


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def can_stream(plan: LoadPlan) -> bool:
    """Whether an artifact's layers can be read one at a time: safetensors that load natively, without quantizer
    hooks."""
    artifact = plan.artifact
    return (
        plan.load_path in (NATIVE, NATIVE_QUANTIZED, NATIVE_UNPACKED)
        and artifact.kind != FAKEQUANT
        and artifact.source.streamable
    )


def must_stream(plans: Sequence[LoadPlan], devices: Sequence[torch.device]) -> bool:
    """Whether these models, held at once, take more than four fifths of the free memory of all the devices."""
    # Processes of one machine share its memory; a GPU is one process's.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if devices[0].type == "cpu" else 1
    need = sharing * sum(weight_bytes(plan.artifact, plan.dtype) for plan in plans)
    return need > _WEIGHTS_SHARE * sum(map(free_bytes, devices))

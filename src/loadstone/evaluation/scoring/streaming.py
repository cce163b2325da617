"""Models larger than memory: all batches of a round pass through one layer before the next layer is read.

Weights are read once a round instead of once a batch, and two layers are held at a time (one computes while
the next is read). The operations are those of the resident model in the same order, so the numbers are too.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from loadstone.artifact.detect import FAKEQUANT
from loadstone.errors import LoadstoneError, UsageError
from loadstone.evaluation.causal import Probe, Vocabulary, make_probe
from loadstone.evaluation.fast.replace import FastPath, speed_up, speed_up_layer
from loadstone.evaluation.measure import free_bytes
from loadstone.evaluation.scoring.head import flat_attention, logits_of, split_head
from loadstone.evaluation.served_inputs import round_model_inputs
from loadstone.loading import LoadPlan
from loadstone.loading.layer_inputs import Change
from loadstone.loading.placement import weight_bytes
from loadstone.loading.plan import NATIVE, NATIVE_QUANTIZED, NATIVE_UNPACKED
from loadstone.loading.streamed import StreamedModel
from loadstone.quantization.weight_use import weights_used_otherwise

log = logging.getLogger(__name__)
# Of free memory: for the hidden states of a round; and what weights may take before they are streamed.
_STATES_SHARE, _WEIGHTS_SHARE = 0.25, 0.8
# Seconds between log lines on the progress of a round: the bar moves at its end only.
_LOG_EVERY = 20.0
Call = tuple[tuple[Any, ...], dict[str, Any]]


class StreamedLm:
    """A causal language model whose layers are read one at a time. ``together``: the number of batches in a round.

    ``inputs``: what happens to the input of each parameter that has an entry. Raises UsageError for a model whose
    forward does more with its layers than call one after the other, and, when the first layer that shows it has been
    read, for one that is not causal.
    """

    def __init__(
        self, source: StreamedModel, name: str, *, fast: bool, inputs: Mapping[str, Change] | None = None
    ) -> None:
        self.source = source
        inside = f"{source.stack_name}."
        self._inputs = {n: change for n, change in (inputs or {}).items() if n.startswith(inside)}
        round_model_inputs(source.model, {n: c for n, c in (inputs or {}).items() if n not in self._inputs})
        self.config = source.model.config
        self._name = name
        self._fast = fast
        self._probe: Probe | None = make_probe(source.model, name)
        self._first_output = self._run_first_layer(self._probe.ids)
        # Of the whole model: a layer alone does not say which branches its config switches off.
        self._read = weights_used_otherwise(source.model)
        self.fast = speed_up(source.model) if fast else FastPath()
        self.together = 1
        self._counted: set[int] = set()
        self._seen: dict[torch.Size, list[Call]] = {}
        # Bits decide how the model is split; stand-ins for the layers give the same hidden states to both ways.
        with self._layers_returning(None):
            logits = self._probe.logits(partial(logits_of, source.model))
            split = split_head(source.model)
        self.vocabulary = Vocabulary(self._probe.inputs, logits.shape[-1])
        self._backbone = split.backbone
        try:
            states, _ = self._enter(self._probe.ids)
        except UsageError:
            raise
        except Exception as error:
            raise self._refused(f"its forward needs more than they return ({error})") from None
        # Bytes of one token's hidden state between layers.
        self._row = states.shape[-1] * states.element_size()
        self.split_model = replace(split, backbone=lambda ids: next(self.hidden([ids])), together=self.hidden)

    def get_input_embeddings(self) -> Any:
        return self.source.model.get_input_embeddings()

    def plan_round(self, tokens: int, models: int) -> None:
        """Choose how many batches of ``tokens`` each go into a round, with ``models`` - 1 other models in memory."""
        room = _STATES_SHARE * free_bytes(self.source.device)
        self.together = max(1, int(room / (tokens * self._row * models)))

    def hidden(self, many: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Hidden states (B, L, H) for each of the ids (B, L), layer by layer for all of them."""
        # The probe goes through the layers with the first round, so that no layer is read for it alone.
        probe = self._probe
        many = list(many) if probe is None else [probe.ids, *many]
        states, calls = zip(*(self._enter(ids) for ids in many), strict=True)
        now = list(states)
        passed: list[dict[_Passed, Any]] = [{} for _ in now]
        needed = {value for args, kwargs in calls[0] for value in _values(args, kwargs) if _is_passed(value)}
        logged = time.perf_counter()
        with ThreadPoolExecutor(1) as pool, flat_attention():
            coming = pool.submit(self._layer, 0)
            for index in range(len(self.source)):
                layer = coming.result()
                if index + 1 < len(self.source):
                    coming = pool.submit(self._layer, index + 1)
                for batch, call in enumerate(calls):
                    args, kwargs = _with_passed(call[index], passed[batch])
                    out = layer(now[batch], *args, **kwargs)
                    now[batch], *others = out if isinstance(out, tuple | list) else (out,)
                    for number, value in enumerate(others):
                        if _Passed(index, number) in needed:
                            passed[batch][_Passed(index, number)] = value
                del layer
                if probe is not None:
                    probe.require_causal(now[0])
                if time.perf_counter() - logged > _LOG_EVERY:
                    logged = time.perf_counter()
                    log.info("layer %d of %d, %d batches", index + 1, len(self.source), len(now))
        for batch, ids in enumerate(many):
            with self._layers_returning(now[batch]):
                last = self._backbone(ids)
            now[batch] = ids  # frees the states
            if probe is not None and batch == 0:
                probe.require_causal(last)
                self._probe = None
                continue
            yield last

    def _layer(self, index: int) -> nn.Module:
        layer = self.source.layer(index)
        start = f"{self.source.stack_name}.{index}."
        here = {n.removeprefix(start): c for n, c in self._inputs.items() if n.startswith(start)}
        round_model_inputs(layer, here)
        if self._fast:
            read = {n.removeprefix(start) for n in self._read if n.startswith(start)}
            counted = speed_up_layer(layer, read, like=self.get_input_embeddings().weight)
            if index not in self._counted:
                self._counted.add(index)
                self.fast = self.fast + counted
        return layer

    def _run_first_layer(self, ids: torch.Tensor) -> Any:
        """The output of the first layer: its type is what the model's forward expects of all of them."""
        reached: list[Any] = []

        def stop(index: int, *args: Any, **kwargs: Any) -> None:
            reached.append((index, args, kwargs))
            raise _Stop

        try:
            with _replaced_layers(self.source.stack, stop), flat_attention(), torch.no_grad():
                self.source.model(input_ids=ids, use_cache=False)
        except _Stop:
            pass
        except Exception as error:
            raise self._refused(f"its forward fails before the first layer ({error})") from None
        if not reached or reached[0][0] != 0:
            raise self._refused("its forward does not begin with the first of them")
        _, args, kwargs = reached[0]
        with torch.no_grad(), flat_attention():
            try:
                return self.source.layer(0)(*args, **kwargs)
            except LoadstoneError:
                raise
            except Exception as error:
                raise self._refused(f"the first fails alone ({type(error).__name__}: {error})") from None

    def _output(self, index: int, state: torch.Tensor) -> Any:
        """What layer ``index`` returns to the model's forward when it leaves ``state``."""
        if not isinstance(self._first_output, tuple | list):
            return state
        others = self._first_output[1:]
        return (state, *(None if v is None else _Passed(index, k) for k, v in enumerate(others)))

    @torch.no_grad()
    def _enter(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """The hidden states (B, L, H) that enter the first layer, and the other arguments of each layer: recorded from
        the model's own forward, with layers that only record and pass on."""
        calls: list[Call] = []
        states: list[torch.Tensor] = []

        def note(index: int, *args: Any, **kwargs: Any) -> Any:
            state, args = (kwargs.pop("hidden_states"), args) if not args else (args[0], args[1:])
            if index != len(calls):
                raise self._refused("its forward calls them in another order, or some of them twice")
            if states and state is not states[0]:
                raise self._refused("its forward computes something between them")
            states.append(state)
            calls.append((args, kwargs))
            return self._output(index, state)

        with _replaced_layers(self.source.stack, note):
            self._backbone(ids)
        if len(calls) != len(self.source):
            raise self._refused(f"its forward calls {len(calls)} of its {len(self.source)} layers")
        known = self._seen.setdefault(ids.shape, calls)
        # Masks and position embeddings of one shape are usually equal for all batches: store them once.
        return states[0], known if known is calls or _same_calls(known, calls) else calls

    @contextmanager
    def _layers_returning(self, state: torch.Tensor | None) -> Iterator[None]:
        """Layers that return ``state``, or for None what they are given, for the length of a block."""

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            return self._output(index, given if state is None else state)

        with _replaced_layers(self.source.stack, stand_in):
            yield

    def _refused(self, why: str) -> UsageError:
        return UsageError(
            f"--stream: the layers of '{self._name}' ({type(self.source.model).__name__}) cannot be computed one at a "
            f"time: {' '.join(why.split())[:200]}",
            "Leave --stream out (--no-stream where the size of the model turned it on)",
        )


class _Stop(Exception):
    """Ends a forward pass at its first layer."""


class _Passed(NamedTuple):
    """Stands for what a layer returns beside its hidden states, which the model may hand to a later layer."""

    layer: int
    number: int


def _is_passed(value: Any) -> bool:
    return isinstance(value, _Passed)


def _values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [*args, *kwargs.values()]


def _with_passed(call: Call, passed: dict[_Passed, Any]) -> Call:
    """A call with what earlier layers returned in place of what stands for it."""
    args, kwargs = call
    return (
        tuple(passed[v] if _is_passed(v) else v for v in args),
        {k: passed[v] if _is_passed(v) else v for k, v in kwargs.items()},
    )


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
    """Whether two lists of calls are equal and may be stored once: nothing in them can change."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, bool | int | float | str) and one == other)


def _same_calls(one: list[Call], other: list[Call]) -> bool:
    return all(
        _same(a[0], b[0]) and a[1].keys() == b[1].keys() and all(_same(a[1][k], b[1][k]) for k in a[1])
        for a, b in zip(one, other, strict=True)
    )


def can_stream(plan: LoadPlan) -> bool:
    """Whether an artifact's layers can be read one at a time: safetensors that load natively, without quantizer
    hooks."""
    artifact = plan.artifact
    return (
        plan.load_path in (NATIVE, NATIVE_QUANTIZED, NATIVE_UNPACKED)
        and artifact.kind != FAKEQUANT
        and artifact.source.streamable
    )


def must_stream(plans: Sequence[LoadPlan], devices: Sequence[torch.device], share: float = 1.0) -> bool:
    """Whether these models, or a ``share`` of each, held at once, take more than four fifths of the free memory of all
    the devices."""
    # Processes of one machine share its memory; a GPU is one process's.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if devices[0].type == "cpu" else 1
    need = share * sharing * sum(weight_bytes(plan.artifact, plan.dtype) for plan in plans)
    return need > _WEIGHTS_SHARE * sum(map(free_bytes, devices))

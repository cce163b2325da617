"""Greedy decoding with one CUDA graph a token, for ``model.generate(…, custom_generate=loadstone.greedy_decoding)``.

For each token `generate`'s own loop prepares inputs on the host and launches every kernel between the products anew:
on a GPU that takes longer than a quantized model's products. Here the model's forward, the choice of the token and its
bookkeeping are captured once, and a token costs one replay. Decoder layers are compiled for the capture: one graph of
one layer, used for all.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as once
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.cache_utils import StaticLayer
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING

from loadstone.artifact.torchao.flatten import plain_parts
from loadstone.errors import UsageError
from loadstone.loading.graphs import Graph, capture, put_back
from loadstone.loading.layers import INDUCTOR, layer_stack

log = logging.getLogger(__name__)
# Lengths of a cache are multiples of this, so that prompts of many lengths use one graph.
_LENGTHS = 128
# Tokens written between two looks at whether every sequence has ended, for which the host waits.
_CHECK_EVERY = 16
# The most that logits of compiled layers may differ from plain ones, relative to the largest: rounding in bfloat16
# differs by a few hundredths, a wrong layer's cache by about one.
_TOLERANCE = 1 / 8
# Shapes that a process compiles the layers of its models for, before it goes on without.
_MOST_COMPILED = 64
_KNOWN_INPUTS = {"past_key_values", "use_cache", "attention_mask", "position_ids", "logits_to_keep"}


def greedy_decoding(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """``custom_generate`` for transformers' ``generate``: the tokens of its greedy decoding, int64 (B, T) with prompts.

    Needs ``cache_implementation="static"``. Whatever else is asked for (sampling, beams, scores, processors that change
    logits, a streamer, other caches, several devices) is left to transformers' own loop. On a CPU nothing is captured
    or compiled. Compiled layers round otherwise than plain ones, as `generate`'s own do: where two tokens nearly tie in
    bfloat16, another one may be chosen.

    Raises `UsageError` for a way of decoding that transformers fetches from the hub (contrastive search, …).
    """
    # transformers does not pass the streamer on to a function: it is read from the frame of `generate`.
    streamer = sys._getframe(1).f_locals.get("streamer")
    if streamer is not None or not _takes(
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
    ):
        mode = generation_config.get_generation_mode()
        method = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
        if method is None:
            raise UsageError(
                f"{mode.value.replace('_', ' ')} is code that transformers fetches from the hub",
                "Call generate without custom_generate",
            )
        return method(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **({} if streamer is None else {"streamer": streamer}),
            **model_kwargs,
        )
    count = stopping_criteria.max_length - input_ids.shape[1]
    # Tensors made in inference mode could not be written outside of it later.
    with torch.inference_mode(False), torch.no_grad():
        writer = _writer(model, input_ids, count, model_kwargs)
        with writer.lock:
            model_kwargs["past_key_values"] = writer.begin()
            out = model._prefill(input_ids, generation_config, model_kwargs)
            scores = logits_processor(input_ids, out.logits[:, -1].float())
            writer.fill(scores, model_kwargs)
            ends = next((c.eos_token_id for c in stopping_criteria if hasattr(c, "eos_token_id")), None)
            written = _write(
                model, writer, count, _tokens_before_end(input_ids, logits_processor), ends, generation_config
            )
            if ends is not None:
                written = _ended(written, ends.to(written.device), generation_config._pad_token_tensor)
            return torch.cat([input_ids, written], 1)


def _takes(
    model: Any,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: Any,
    model_kwargs: dict[str, Any],
) -> bool:
    """Whether the loop here writes what transformers' own writes, for this call."""
    cache: Any = model_kwargs.get("past_key_values")
    mask = model_kwargs.get("attention_mask")
    return (
        config.get_generation_mode() == GenerationMode.GREEDY_SEARCH
        and not config.return_dict_in_generate
        and not model.config.is_encoder_decoder
        # Exact types: a subclass may do more.
        and all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in criteria)
        and all(type(p) in (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor) for p in processors)
        and {name for name, value in model_kwargs.items() if value is not None} <= _KNOWN_INPUTS
        and (mask is None or mask.dim() == 2)
        # A new cache of `generate`'s own, which nobody else holds.
        and type(cache) is StaticCache
        and not getattr(cache, "_is_user_defined", False)
        and not cache.offloading
        and all(type(layer) is StaticLayer and not layer.is_initialized for layer in cache.layers)
        and type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and getattr(model, "tp_size", None) is None
        and {parameter.device for parameter in model.parameters()} == {input_ids.device}
    )


@dataclass(eq=False)
class _Writer:
    """The memory that a model's graph reads and writes, for a batch of B sequences of up to L tokens.

    ``token`` (B, 1), the last one; ``position`` (…, B, 1) or None, its position; ``mask`` (B, L) or None, which tokens
    of a padded batch are seen; ``written`` (B, L), all tokens so far, and ``at`` (1,), how many; ``banned`` (V,),
    -infinity for tokens that may not be chosen.
    """

    key: tuple[Any, ...]
    cache: StaticCache
    length: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    graph: Graph | None = None
    capturable: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    token: Tensor | None = None
    position: Tensor | None = None
    mask: Tensor | None = None
    written: Any = None
    at: Any = None
    banned: Any = None

    def begin(self) -> StaticCache:
        """The cache, empty."""
        if self.token is not None:
            self.cache.reset()
        return self.cache

    def fill(self, scores: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Begin with the token that ``scores`` (B, V) choose after the prompt, which the cache holds."""
        token = scores.argmax(-1, keepdim=True)
        position, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        if self.token is None:
            self.token = torch.empty_like(token)
            self.position = None if position is None else torch.empty_like(position[..., -1:])
            self.mask = None if mask is None else mask.new_ones(len(token), self.length)
            self.written, self.at = token.new_zeros(len(token), self.length + 1), token.new_zeros(1)
            self.banned = torch.zeros_like(scores[0])
            self.options = {name: model_kwargs[name] for name in ("logits_to_keep",) if name in model_kwargs}
        self.token.copy_(token)
        self.written[:, :1] = token
        self.at.fill_(1)
        if self.position is not None and position is not None:
            self.position.copy_(position[..., -1:] + 1)
        if self.mask is not None and mask is not None:
            self.mask.fill_(1)[:, : mask.shape[1]] = mask

    def changes(self) -> list[Tensor]:
        """What a step changes, besides the slot that it writes in the cache."""
        counts = [layer.cumulative_length for layer in self.cache.layers]
        own = (self.token, self.position, self.written, self.at)
        return [tensor for tensor in own if tensor is not None] + counts


# For each model the last memory and graph: they are used again while batch size, length and weights are the same.
_WRITERS: WeakKeyDictionary[Any, _Writer] = WeakKeyDictionary()


def _writer(model: Any, input_ids: Tensor, count: int, model_kwargs: dict[str, Any]) -> _Writer:
    length = -(-(input_ids.shape[1] + count) // _LENGTHS) * _LENGTHS
    position = model_kwargs.get("position_ids")
    weights = (part for named in (model.named_parameters(), model.named_buffers()) for part in named)
    key = (
        input_ids.device,
        len(input_ids),
        model_kwargs.get("attention_mask") is not None,
        None if position is None else position.shape[:-1],
        model.config.get_text_config()._attn_implementation,
        # Weights that were moved or replaced are not those that a graph reads.
        tuple(plain.data_ptr() for name, tensor in weights for _, plain in plain_parts(name, tensor)),
    )
    found = _WRITERS.get(model)
    if found is None or found.key != key or found.length < length:
        config = model.config.get_text_config(decoder=True)
        found = _WRITERS[model] = _Writer(key, StaticCache(config=config, max_cache_len=length), length)
    return found


def _write(
    model: Any, writer: _Writer, count: int, least: int, ends: Tensor | None, generation_config: Any
) -> Tensor:
    """Write ``count`` tokens, or until every sequence has one of ``ends`` (no sooner than after ``least``): (B, T)."""
    step: Callable[[], Any] = partial(_step, model, writer)
    with model._optimize_model_for_decode():
        if count > 1 and writer.token is not None and writer.token.is_cuda and writer.capturable:
            if writer.graph is None:
                compiles = model._valid_auto_compile_criteria(
                    {"past_key_values": writer.cache}, generation_config
                )
                writer.graph = _captured(model, writer, compiles)
                writer.capturable = writer.graph is not None
            if writer.graph is not None:
                step = writer.graph.replay
        writer.banned.zero_()
        if ends is not None and least > 1:
            writer.banned[ends] = -torch.inf
        for number in range(1, count):
            if number == least and ends is not None:
                writer.banned.zero_()
            step()
            if ends is not None and number % _CHECK_EVERY == 0:
                so_far = writer.written[:, : number + 1]
                if torch.isin(so_far, ends.to(so_far.device)).any(1).all():
                    return so_far.clone()  # type: ignore[no-any-return]
    return writer.written[:, :count].clone()  # type: ignore[no-any-return]


def _step(model: Any, writer: _Writer) -> tuple[Tensor]:
    """Read the last token and write the next one; gives the logits (B, V) that it was chosen by."""
    inputs = {"position_ids": writer.position, "attention_mask": writer.mask}
    out = model(
        input_ids=writer.token,
        past_key_values=writer.cache,
        use_cache=True,
        return_dict=True,
        **{name: tensor for name, tensor in inputs.items() if tensor is not None},
        **writer.options,
    )
    logits = out.logits[:, -1].float()
    token = (logits + writer.banned).argmax(-1, keepdim=True)
    writer.written.index_copy_(1, writer.at, token)
    writer.at.add_(1)
    assert writer.token is not None
    writer.token.copy_(token)
    if writer.position is not None:
        writer.position.add_(1)
    return (logits,)


def _captured(model: Any, writer: _Writer, compiles: bool) -> Graph | None:
    """A step as a graph: of compiled layers where they compile and agree with plain ones, else of plain ones."""
    step, changes = partial(_step, model, writer), writer.changes()
    device = changes[0].device
    layers = layer_stack(model) if compiles else None
    if layers is not None and len(layers.layers) == len(writer.cache.layers):
        with put_back(changes):
            (plain,) = step()
        try:
            with _compiled(layers.layers, writer.cache):
                graph = capture(step, device, changes=changes)
        except Exception as error:  # of many kinds: whatever a compiler and its tools fail with
            log.info("decoder layers are not compiled: %s", " ".join(str(error).split())[:200])
            graph = None
        if graph is not None:
            apart = (graph.outputs[0] - plain).abs().max()
            # `<=` and not `>`: a NaN fails too.
            if apart <= _TOLERANCE * plain.abs().max():
                return graph
            log.info("compiled decoder layers are not used: logits differ by %.2g", apart)
    return capture(step, device, changes=changes)


class _OneLayer:
    """A cache's layer as decoder layers take the whole cache. Layers that name no number share a compiled graph."""

    is_compileable = True

    def __init__(self, layer: StaticLayer) -> None:
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.layer.update(keys, values, *args, **kwargs)


@once
def _compiled_call() -> Callable[..., Any]:
    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return layer._call_impl(*args, **kwargs)

    return torch.compile(call, dynamic=False, options=INDUCTOR)


@contextmanager
def _compiled(layers: nn.ModuleList, cache: StaticCache) -> Iterator[None]:
    """Within the block, decoder layers are compiled, each with its own layer of ``cache``."""
    before = [layer._compiled_call_impl for layer in layers]

    def call(layer: nn.Module, own: _OneLayer, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is cache:
            kwargs["past_key_values"] = own
        return _compiled_call()(layer, *args, **kwargs)

    try:
        for layer, own in zip(layers, cache.layers, strict=True):
            layer._compiled_call_impl = partial(call, layer, _OneLayer(own))
        with torch._dynamo.config.patch(recompile_limit=_MOST_COMPILED):
            yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer._compiled_call_impl = own


def _tokens_before_end(input_ids: Tensor, processors: LogitsProcessorList) -> int:
    """How many tokens must be written before a sequence may end."""
    least = [0]
    for processor in processors:
        if type(processor) is MinLengthLogitsProcessor:
            least.append(processor.min_length - input_ids.shape[1])
        elif type(processor) is MinNewTokensLengthLogitsProcessor:
            least.append(processor.min_new_tokens + processor.prompt_length_to_skip - input_ids.shape[1])
    return max(least)


def _ended(written: Tensor, ends: Tensor, padding: Tensor | None) -> Tensor:
    """``written`` with padding after each sequence's end, as long as the longest."""
    is_end = torch.isin(written, ends)
    after = is_end.cumsum(1) - is_end.long() > 0
    if padding is not None:
        written = torch.where(after, padding.to(written.device), written)
    return written[:, : int((~after).sum(1).max())]

"""A transformers cache that begins with a shared, frozen prefix.

Every request forks the cache: forks share the prefix's tensors and hold nothing but their own tokens. Attention that
goes through `loadstone.context.prefix.attention` reads the shared tensors where they lie; any other gets prefix and own
tokens concatenated, one layer at a time, for the length of that layer's attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from loadstone.context.prefix.attention import MARK, NAME
from loadstone.context.prefix.reading import Reader
from loadstone.context.prefix.stored_states import Stored, keep
from loadstone.errors import ArtifactError, UsageError
from loadstone.loading.positions import same_frequencies

FULL, SLIDING, LINEAR, EMPTY = "full", "sliding", "linear", "empty"


@dataclass(frozen=True, eq=False)
class LayerState:
    """What one layer keeps of a prefix. ``rows``: tokens it has seen; a sliding layer keeps the last ``window - 1`` of
    them. ``states``: a linear-attention layer's convolution and recurrent states by name."""

    kind: str
    rows: int
    keys: Stored | None = None
    values: Stored | None = None
    window: int | None = None
    states: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        named = dict(self.states)
        for name, stored in (("keys", self.keys), ("values", self.values)):
            if stored is not None:
                named |= {f"{name}.{part}": tensor for part, tensor in stored.parts.items()}
        return named


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt that a model has read. ``tokens``: int64 (1, P). ``logits``: float32 (1, V), of the token after it;
    ``hidden``: the last hidden state behind them, (1, 1, H). ``text``: what was tokenized; ``template``: whether a chat
    template rendered it."""

    tokens: Tensor
    layers: tuple[LayerState, ...]
    logits: Tensor
    hidden: Tensor
    dtype: torch.dtype
    cache_kind: str
    text: str
    template: bool = False
    model: Any = None
    tokenizer: Any = None
    # Whether the model was found to take a padded batch after a prefix; True where that was not tried.
    padding: bool = True

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the shared keys, values and states."""
        return sum(t.nbytes for layer in self.layers for t in layer.tensors().values())


class SharedLayer(DynamicLayer):
    """Full attention: the shared prefix, then the request's own tokens in ``keys`` and ``values``."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, state: LayerState, owner: PrefixCache) -> None:
        super().__init__()
        self.state = state
        self.owner = owner

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.owner.require_room(self.get_seq_length() + key_states.shape[-2])
        keys, values = key_states, value_states
        if self.is_initialized and self.keys.numel():
            keys, values = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        if self.owner.keeps:
            self.hold(keys, values)
        assert self.state.keys is not None and self.state.values is not None
        prefix = self.state.keys.read(keys.dtype), self.state.values.read(values.dtype)
        if self.owner.shares:
            # A view: the mark must not stay on a tensor that lives on.
            keys = keys.view_as(keys)
            setattr(keys, MARK, prefix)
            return keys, values
        batch = keys.shape[0]
        return (
            torch.cat([prefix[0].expand(batch, -1, -1, -1), keys], -2),
            torch.cat([prefix[1].expand(batch, -1, -1, -1), values], -2),
        )

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Keep these as the request's own tokens, in place of those it had."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values

    def _own(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        return self.state.rows + self._own()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        own = self._own() + query_length
        return (own, self.state.rows) if self.owner.shares else (self.state.rows + own, 0)

    def reset(self) -> None:
        """Back to the bare prefix."""
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        _check_crop(tokens_to_remove, self._own())
        if tokens_to_remove:
            super().crop(tokens_to_remove)

    # The prefix is the same for every request: what reorders or repeats them moves their own tokens only.
    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._own():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._own():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._own():
            super().batch_select_indices(indices)


class SlidingLayer(DynamicSlidingWindowLayer):
    """Sliding attention: begins with the prefix's last tokens; a window is a request's own once it has moved."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, state: LayerState, owner: PrefixCache) -> None:
        super().__init__(sliding_window=state.window)
        self.state = state
        self.owner = owner
        self.reset()

    def reset(self) -> None:
        self.cumulative_length = self.state.rows
        self.keys = self.values = None
        self.is_initialized = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.owner.require_room(self.cumulative_length + key_states.shape[-2])
        if not self.is_initialized:
            assert self.state.keys is not None and self.state.values is not None
            self.lazy_initialization(key_states, value_states)
            batch = key_states.shape[0]
            self.keys = self.state.keys.read(key_states.dtype).expand(batch, -1, -1, -1)
            self.values = self.state.values.read(value_states.dtype).expand(batch, -1, -1, -1)
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        if not self.owner.keeps:
            self.reset()
        return found

    def crop(self, tokens_to_remove: int) -> None:
        _check_crop(tokens_to_remove, self.cumulative_length - self.state.rows)
        if tokens_to_remove:
            super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)


class LinearLayer(LinearAttentionLayer):
    """Linear attention: its states are small, and updated in place, so every request has its own."""

    def __init__(self, state: LayerState, owner: PrefixCache) -> None:
        names = state.states
        super().__init__(number_of_states=1 + max((int(n.rpartition(".")[2]) for n in names), default=0))
        self.state = state
        self.owner = owner
        self.reset()

    def reset(self) -> None:
        self._start(1)

    def _start(self, batch: int) -> None:
        for name, tensor in self.state.states.items():
            kind, number = name.rsplit(".", 1)
            index = int(number)
            own = tensor.expand(batch, *[-1] * (tensor.dim() - 1)).clone()
            self.device, self.dtype = own.device, own.dtype
            self.has_previous_state[index] = True
            if kind == "conv":
                self.conv_states[index] = own
                self.conv_kernel_size[index] = own.shape[-1]
                self.is_conv_states_initialized[index] = True
            else:
                self.recurrent_states[index] = own
                self.is_recurrent_states_initialized[index] = True

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UsageError("a linear-attention layer cannot forget tokens", "Fork the prefix again instead")


class PrefixCache(Cache):
    """A prefix for one request (of any batch size), in the form that transformers' models take.

    ``model.generate(**cache.inputs("…"))`` is the easy way; ``past_key_values=cache.fork()`` the plain one. Pass each
    request its own fork: the prefix stays as it is, a used fork holds its request's tokens (``reset`` drops them).
    ``keeps=False`` forgets a request's tokens at once, for models that are called a single time.
    """

    def __init__(self, prefix: Prefix, *, batch: int = 1, keeps: bool = True, share: bool = True) -> None:
        self.prefix = prefix
        self.keeps = keeps
        self.share = share
        self._reader: Reader | None = None
        model = prefix.model
        self.most = None if model is None else same_frequencies(model.config, prefix.length)
        layers: list[Any] = []
        for state in prefix.layers:
            if state.kind == EMPTY:
                # Layers without a cache of their own have a class from transformers 5.18 on.
                layers.append(getattr(cache_utils, "DummyLayer", DynamicLayer)())
            else:
                layers.append(
                    {FULL: SharedLayer, SLIDING: SlidingLayer, LINEAR: LinearLayer}[state.kind](state, self)
                )
        super().__init__(layers=layers)
        if batch > 1:
            for layer in layers:
                if isinstance(layer, LinearLayer):
                    layer._start(batch)

    def fork(self, *, batch: int = 1, keeps: bool = True) -> PrefixCache:
        """A cache for another request, sharing this one's prefix. ``batch`` matters to linear attention only."""
        return PrefixCache(self.prefix, batch=batch, keeps=keeps, share=self.share)

    def read(self, ids: Tensor) -> tuple[Tensor, PrefixCache]:
        """Logits (B, V) of the token that follows ``ids`` (B, T) after the prefix, int64 and on its device, in the
        model's dtype; and a fork that holds those tokens, to go on with.

        What a call of the model with a fork gives. On a GPU it comes sooner where there are few tokens and all layers
        have full attention: from the second request of about that length on it is one CUDA graph, which reads the
        weights where they were then; requests are padded to a power of two, so sums may round otherwise.
        """
        if ids.dim() != 2 or not ids.numel():
            raise UsageError(
                f"token ids have the shape {tuple(ids.shape)}", "Give (rows, tokens), at least one of each"
            )
        if self.prefix.model is None:
            raise UsageError("this prefix came without a model", "Load it with loadstone.load_context")
        self._reader = self._reader or Reader(self)
        return self._reader(ids)

    def require_room(self, tokens: int) -> None:
        """Raise UsageError where prefix and request together are so long that rotary frequencies change."""
        most = (
            None
            if self.prefix.model is None
            else same_frequencies(self.prefix.model.config, self.prefix.length)
        )
        if most is not None and tokens > most:
            raise UsageError(
                f"prefix and request have {tokens} tokens: beyond {most} this model's rotary frequencies change, and "
                f"the prefix keeps those of its {self.prefix.length} tokens",
                "Shorten the request, or read all of it without a prefix",
            )

    @property
    def shares(self) -> bool:
        """Whether the model's attention reads the prefix where it lies."""
        model = self.prefix.model
        return self.share and model is not None and text_config(model)._attn_implementation == NAME

    @property
    def takes_padding(self) -> bool:
        """Whether padding between the prefix and a request's tokens leaves no trace. Windows count padding as tokens,
        and linear attention reads it."""
        return self.prefix.padding and all(state.kind in (FULL, EMPTY) for state in self.prefix.layers)

    @property
    def tokens(self) -> Tensor:
        """The prefix's token ids, int64 (1, P)."""
        return self.prefix.tokens

    @property
    def model(self) -> Any:
        """The base model."""
        return self.prefix.model

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer, None where the base was given as a model alone."""
        return self.prefix.tokenizer

    @property
    def nbytes(self) -> int:
        """Bytes of the shared prefix."""
        return self.prefix.nbytes

    def inputs(self, texts: str | Sequence[str]) -> dict[str, Any]:
        """What ``generate`` takes to go on with each of ``texts`` after the prefix: one batch, padded on the left.

        ``input_ids`` (B, P + T) hold the prefix too, as transformers expects with a filled cache.
        """
        rows = [texts] if isinstance(texts, str) else list(texts)
        if self.tokenizer is None:
            raise UsageError(
                "this prefix came without a tokenizer", "Load it with a base directory, or tokenizer="
            )
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows]
        if not rows or not all(ids):
            raise UsageError(
                "there is nothing to go on with after the prefix", "Give at least one token of text"
            )
        width = max(map(len, ids))
        if min(map(len, ids)) < width and not self.takes_padding:
            raise UsageError(
                "this model sees padding (sliding windows and linear attention do): texts of different lengths cannot "
                "go into one batch after a prefix",
                "Give them one at a time",
            )
        padded = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, own in enumerate(ids):
            padded[row, width - len(own) :] = torch.tensor(own)
            mask[row, width - len(own) :] = 1
        tokens = self.prefix.tokens
        device = tokens.device
        start = tokens.expand(len(ids), -1)
        return {
            "input_ids": torch.cat([start, padded.to(device)], 1),
            "attention_mask": torch.cat([torch.ones_like(start), mask.to(device)], 1),
            "past_key_values": self.fork(batch=len(ids)),
        }


def capture(cache: Cache, rows: int, kind: str) -> tuple[LayerState, ...]:
    """The state of each layer of a model's own cache after ``rows`` tokens, keys and values kept as ``kind``.

    Raises ArtifactError, naming it, for a kind of layer whose state is not known here.
    """
    return tuple(_captured(layer, number, rows, kind) for number, layer in enumerate(cache.layers))


def _captured(layer: Any, number: int, rows: int, kind: str) -> LayerState:
    # Exact types: a subclass keeps more than its parent does.
    if type(layer).__name__ == "DummyLayer":
        return LayerState(EMPTY, rows)
    if type(layer) is DynamicLayer or type(layer) is DynamicSlidingWindowLayer:
        window = getattr(layer, "sliding_window", None)
        if not layer.is_initialized:
            # A layer that reads another one's keys has none of its own.
            return LayerState(EMPTY, rows)
        return LayerState(
            FULL if window is None else SLIDING,
            rows,
            keep(layer.keys, kind, values=False),
            keep(layer.values, kind, values=True),
            window,
        )
    if type(layer) is LinearAttentionLayer:
        states = {
            f"{name}.{index}": tensor.detach().clone()
            for name, held in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states))
            for index, tensor in held.items()
            if tensor is not None
        }
        return LayerState(LINEAR, rows, states=states)
    raise ArtifactError(
        f"layer {number} keeps its past in a {type(layer).__name__}, which a prefix cannot hold",
        "Prefixes hold full, sliding-window and linear attention; evaluate this model without one",
    )


def text_config(model: Any) -> Any:
    """The part of a model's config that its decoder layers read."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _check_crop(tokens_to_remove: int, own: int) -> None:
    if tokens_to_remove > 0 or -tokens_to_remove > own:
        raise UsageError(
            f"cannot remove {abs(tokens_to_remove)} tokens: {own} came after the prefix, which is frozen",
            "Pass a negative number of at most that many",
        )

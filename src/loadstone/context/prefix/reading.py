"""Reading a request's tokens after a prefix up to the first token of the answer, on a GPU as one CUDA graph.

Few tokens after a prefix keep a GPU busy for less time than launching their kernels takes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from loadstone.loading.graphs import Captured
from loadstone.loading.positions import positions

# A graph is for tokens of a power of two, from the first number to the second (of all rows together): more keep a GPU
# busy.
_FEWEST, _MOST = 16, 2048


class Reader:
    """Reads tokens after the prefix of a `PrefixCache`. Where a graph is used, requests are padded on the right, which
    no token sees."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._captured = Captured(self._padded)
        model = cache.model
        self._most = min(
            (n for n in (cache.most, positions(model.config).limit) if n is not None), default=2**62
        )
        shapes = set()
        for state in cache.prefix.layers:
            pair = [s.read(cache.prefix.dtype).shape for s in (state.keys, state.values) if s is not None]
            shapes.add((state.kind, *pair))
        self._alike = len(shapes) == 1 and all(kind == "full" for kind, *_ in shapes)

    def __call__(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Logits (B, V) after ``ids`` (B, T), and a fork that holds those tokens."""
        batch, length = ids.shape
        width = max(_FEWEST, 1 << (length - 1).bit_length())
        end = self._cache.prefix.length
        self._cache.require_room(end + length)
        model, fork = self._cache.model, self._cache.fork(batch=batch)
        # Tensors made in inference mode could not be written outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            if not self.captures(batch * width) or end + width > self._most:
                out = model(input_ids=ids, past_key_values=fork, use_cache=True, **last_only(model))
                return out.logits[:, -1], fork
            padded = torch.nn.functional.pad(ids, (0, width - length))
            logits, keys, values = self._captured(padded, torch.tensor([length - 1], device=ids.device))
        for layer, own_keys, own_values in zip(
            fork.layers, keys[..., :length, :], values[..., :length, :], strict=True
        ):
            layer.hold(own_keys, own_values)
        return logits, fork

    def captures(self, tokens: int) -> bool:
        """Whether so many tokens are read by a graph."""
        return (
            self._alike
            and self._cache.tokens.is_cuda
            and tokens <= _MOST
            and bool(last_only(self._cache.model))
        )

    def _padded(self, ids: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, V) after the token at ``last`` (1,), and each layer's own keys and values, (L, B, heads, T, D)."""
        fork = self._cache.fork(batch=len(ids))
        out = self._cache.model(input_ids=ids, past_key_values=fork, use_cache=True, logits_to_keep=last)
        own: list[Any] = fork.layers
        keys, values = torch.stack([each.keys for each in own]), torch.stack([each.values for each in own])
        return out.logits[:, -1], keys, values


def last_only(model: Any) -> dict[str, int]:
    """The argument that leaves out the logits of all tokens but the last, for models that know it."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known else {}

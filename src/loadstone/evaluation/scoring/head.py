"""A causal language model split into backbone and head, so that logits are computed for a few positions at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from loadstone.evaluation.scoring.compiling import eagerly, is_compiled
from loadstone.loading.layers import hidden_parts

log = logging.getLogger(__name__)
# Logits of one chunk (float32), in bytes: small enough to stay near a CPU's caches, large enough to fill a
# GPU.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class SplitModel:
    """A causal language model in two parts.

    ``backbone``: token ids (B, L), and a transformers cache that they follow or None, to hidden states (B, L, H).
    ``head``: hidden states (1, n, H) to logits (n, V). ``whole``: the model could not be split; ``backbone`` then gives
    logits (B, L, V), and ``head`` passes them on. ``together``: ``backbone`` for several batches at a time, for models
    that gain from it. ``compiled``: its layers are, and losses on a GPU are computed by a compiled function, too.
    """

    backbone: Callable[..., torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]
    whole: bool
    together: Callable[[Sequence[torch.Tensor]], Iterator[torch.Tensor]] | None = None
    compiled: bool = False

    def hidden(self, many: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Hidden states (B, L, H) for each batch of ids (B, L), in order."""
        return map(self.backbone, many) if self.together is None else self.together(many)


@dataclass(frozen=True, eq=False)
class PrefixedModel:
    """A model whose inputs all follow a prefix, a `PrefixCache`.

    The first column of its inputs stands for the prefix's last token, whatever id it holds. ``inner``: the model's own
    split, if it is known.
    """

    model: Any
    cache: Any
    inner: SplitModel | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    @property
    def split_model(self) -> SplitModel:
        """The model's backbone and head, following the prefix."""
        inner = self.inner or split_head(self.model)
        prefix = self.cache.prefix
        # The prefix's last position: its hidden state, or its logits for a model that could not be split.
        last = prefix.logits[:, None] if inner.whole else prefix.hidden

        def backbone(ids: torch.Tensor) -> torch.Tensor:
            batch = ids.shape[0]
            first = last.expand(batch, -1, -1)
            if ids.shape[1] == 1:
                return first
            rest = inner.backbone(ids[:, 1:], self.cache.fork(batch=batch, keeps=False))
            return torch.cat([first.to(rest), rest], 1)

        return replace(inner, backbone=backbone, together=None)


def split_head(model: Any) -> SplitModel:
    """Split a transformers causal model into backbone and head.

    The head is the model's own ``forward`` with its base model replaced by a given hidden state, so logit scales, soft
    caps and whatever else an architecture applies after the base model are included. A model whose logits this does not
    reproduce bit for bit, on a few tokens, is left whole.
    """
    if hasattr(model, "split_model"):
        return model.split_model  # type: ignore[no-any-return]
    weight = model.get_input_embeddings().weight
    ids = (torch.arange(_PROBE_TOKENS, device=weight.device) % weight.shape[0])[None]
    with torch.no_grad(), eagerly(model):
        expected = logits_of(model, ids)[0]
        for base in hidden_parts(model):
            split = _split_at(model, base)
            try:
                if torch.equal(split.head(split.backbone(ids)), expected):
                    return replace(split, compiled=is_compiled(model))
            # Whatever fails here does not fail for the whole model.
            except Exception as error:
                log.debug("%s cannot be split at %s: %s", type(model).__name__, type(base).__name__, error)
    return SplitModel(partial(logits_of, model), lambda logits: logits[0], True)


def logits_of(model: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """A model's logits (B, L, V) of token ids (B, L), which follow a transformers cache or nothing."""
    with flat_attention():
        return model(input_ids=ids, **_after(cache)).logits  # type: ignore[no-any-return]


def _split_at(model: Any, base: Any) -> SplitModel:
    """Split a model at one of its parts, without comparing logits."""
    output_types: list[type] = []

    def backbone(ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        with flat_attention():
            output = base(input_ids=ids, **_after(cache))
        output_types[:] = [type(output)]
        return output.last_hidden_state  # type: ignore[no-any-return]

    def head(hidden: torch.Tensor) -> torch.Tensor:
        with _returning(base, output_types[0](last_hidden_state=hidden)):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            return model(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]

    return SplitModel(backbone, head, False)


def _after(cache: Any) -> dict[str, Any]:
    return {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}


@contextmanager
def flat_attention() -> Iterator[None]:
    """Attention whose memory does not grow with the square of the context, for the length of a block.

    transformers passes SDPA fewer key than query heads (``enable_gqa``). In float32 on CUDA only the math kernel
    accepts that, and it holds a (length x length) matrix for every head. Here keys and values are repeated instead, so
    that the memory-efficient kernel is used."""
    module, asked, flat = _gqa()
    module.use_gqa_in_sdpa = flat
    try:
        yield
    finally:
        module.use_gqa_in_sdpa = asked


@lru_cache(maxsize=1)
def _gqa() -> tuple[Any, Callable[..., bool], Callable[..., bool]]:
    # One function for the whole process: compiled layers are guarded by its identity.
    from transformers.integrations import sdpa_attention

    asked = sdpa_attention.use_gqa_in_sdpa

    def use_gqa(mask: Any, key: torch.Tensor, *rest: Any) -> bool:
        only_plain = key.device.type == "cuda" and key.dtype == torch.float32
        return not only_plain and asked(mask, key, *rest)

    return sdpa_attention, asked, use_gqa


@contextmanager
def _returning(module: Any, output: Any) -> Iterator[None]:
    # An instance attribute shadows the class's forward. accelerate's hooks are set there too, so restore it.
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def chunk_rows(model: Any, device: torch.device) -> int:
    """Rows of hidden states whose logits are computed at a time."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    vocabulary = getattr(config, "vocab_size", None) or 2**17
    return max(16, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // (4 * vocabulary))

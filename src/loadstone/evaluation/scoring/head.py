"""A causal language model in two halves, so that the logits of a long context are never held at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from loadstone.evaluation.scoring.compiling import eagerly

# Logits of one chunk (float32), in bytes: small enough to stay near a CPU's caches, large enough to fill a
# GPU.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Halves:
    """``backbone``: token ids (B, L), and a transformers cache they come after or None, to hidden states (B, L, H).
    ``head``: hidden states (1, n, H) to logits (n, V).

    When ``whole`` the model could not be divided: ``backbone`` then gives logits (B, L, V) and ``head``
    passes them on. ``together``: ``backbone`` for several batches at a time, where that saves something.
    """

    backbone: Callable[..., torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]
    whole: bool
    together: Callable[[Sequence[torch.Tensor]], Iterator[torch.Tensor]] | None = None

    def hidden(self, many: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Hidden states for each of the ids, one after the other."""
        return map(self.backbone, many) if self.together is None else self.together(many)


@dataclass(frozen=True, eq=False)
class Prefixed:
    """A model after a prefix: the first column of its inputs stands for the prefix's last token, whatever id is there,
    and every row comes after the whole prefix (a `PrefixCache`)."""

    model: Any
    cache: Any
    inner: Halves | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    @property
    def halves(self) -> Halves:
        """The model's own halves (``inner``, where they are known), after the prefix."""
        inner = self.inner or halve(self.model)
        prefix = self.cache.prefix
        # What stands at the prefix's last position: its hidden state, or its logits where a model has no halves.
        last = prefix.logits[:, None] if inner.whole else prefix.hidden

        def backbone(ids: torch.Tensor) -> torch.Tensor:
            batch = ids.shape[0]
            first = last.expand(batch, -1, -1)
            if ids.shape[1] == 1:
                return first
            rest = inner.backbone(ids[:, 1:], self.cache.fork(batch=batch, keeps=False))
            return torch.cat([first.to(rest), rest], 1)

        return Halves(backbone, inner.head, inner.whole)


def halve(model: Any) -> Halves:
    """Divide a transformers causal model; checked on a few tokens, bit for bit, before it is trusted.

    The head half is the model's own ``forward`` with its base model answering from a given hidden state, so
    logit scales, soft caps and whatever else an architecture does after the base model are applied as the
    model applies them. A model for which that does not reproduce its logits exactly is left whole.
    """
    if hasattr(model, "halves"):
        return model.halves  # type: ignore[no-any-return]
    base = getattr(model, "base_model", model)

    def logits_of(ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        with flat_attention():
            output = model(input_ids=ids, **_after(cache))
        return output.logits  # type: ignore[no-any-return]

    whole = Halves(logits_of, lambda logits: logits[0], True)
    if base is model:
        return whole
    halves = divide(model, base)
    ids = torch.arange(_PROBE_TOKENS, device=model.get_input_embeddings().weight.device)[None]
    try:
        with torch.no_grad(), eagerly(model):
            same = torch.equal(halves.head(halves.backbone(ids)), logits_of(ids)[0])
    except (AttributeError, TypeError, IndexError):
        same = False
    return halves if same else whole


def divide(model: Any, base: Any) -> Halves:
    """The two halves of a model around its base model, not checked."""
    output_types: list[type] = []

    def backbone(ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        with flat_attention():
            output = base(input_ids=ids, **_after(cache))
        output_types[:] = [type(output)]
        return output.last_hidden_state  # type: ignore[no-any-return]

    def head(hidden: torch.Tensor) -> torch.Tensor:
        with _answering(base, output_types[0](last_hidden_state=hidden)):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            return model(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]

    return Halves(backbone, head, False)


def _after(cache: Any) -> dict[str, Any]:
    return {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}


@contextmanager
def flat_attention() -> Iterator[None]:
    """Attention whose memory does not grow with the square of the context, for the length of a block.

    transformers hands SDPA fewer key than query heads (``enable_gqa``). In float32 on CUDA no kernel but the
    plain one takes that, and it holds a (length x length) matrix for every head: there keys and values are
    repeated instead, which the memory-efficient kernel takes.
    """
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
def _answering(module: Any, output: Any) -> Iterator[None]:
    # An instance attribute shadows the class's forward (accelerate's hooks live there too: put back what
    # was).
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

"""Whether a model that goes on after a cached beginning computes what one pass over everything computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loadstone.context.prefix.base import architecture_of
from loadstone.context.prefix.cache import PrefixCache
from loadstone.errors import ArtifactError

# Tokens that are read first, and that follow in one call.
_HEAD, _TAIL = 12, 5
# The most that log-probabilities may differ in float32.
TOLERANCE = 1e-4
# Or so many times what the model makes of a rounding error in its embeddings, up to what only an error makes.
_NOISE, _MOST = 20.0, 1.0
# The architectures that were tried in this process, with their largest difference.
_TRIED: dict[str, float] = {}


@torch.no_grad()
def check_continues(model: Any, read: Callable[[Tensor], PrefixCache]) -> None:
    """Raise ArtifactError where several tokens after a cached beginning get other logits than in one uncached pass.

    ``read`` gives the cache after ids (1, P), in the model's dtype. It is called once for each class, config and dtype
    of this process, whose answer is kept.
    """
    name = type(model).__name__
    key = json.dumps(
        [name, str(model.get_input_embeddings().weight.dtype), architecture_of(model.config)], sort_keys=True
    )
    if key not in _TRIED:
        ids = _trial_tokens(model)
        cache = read(ids[:, :_HEAD])
        expected = _one_pass(model, ids)[:, _HEAD:]
        try:
            found = _continued(model, cache, ids)
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{name} cannot read several tokens after a prefix ({reason})",
                "Evaluate this model without a prefix",
            ) from None
        apart = (found - expected).abs().max().item()
        # `<=` and not `>`: a NaN fails too.
        if apart <= TOLERANCE or apart <= min(_NOISE * _response(model, ids, expected), _MOST):
            apart = 0.0
        _TRIED[key] = apart
    if _TRIED[key] != 0.0:
        raise ArtifactError(
            f"{name} does not continue after a prefix as in one pass: log-probabilities differ by "
            f"{_TRIED[key]:.2g} when several tokens follow a cached beginning",
            "Evaluate this model without a prefix",
        )


def _trial_tokens(model: Any) -> Tensor:
    """Ids (1, `_HEAD` + `_TAIL`) that every vocabulary has, all different where it is large enough."""
    weight = model.get_input_embeddings().weight
    count = int(weight.shape[0])
    ids = [(3 + 7 * number) % count for number in range(_HEAD + _TAIL)]
    return torch.tensor([ids], device=weight.device)


def _one_pass(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of one uncached pass over ``ids`` (1, T): float64 (1, T, V)."""
    return _log_probs(model(input_ids=ids, use_cache=False).logits)


def _continued(model: Any, cache: PrefixCache, ids: Tensor) -> Tensor:
    """Log-probabilities of the tokens after the head: most in one call, the last in a call of its own."""
    own = cache.fork()
    calls = (ids[:, _HEAD:-1], ids[:, -1:])
    return torch.cat(
        [_log_probs(model(input_ids=part, past_key_values=own, use_cache=True).logits) for part in calls], 1
    )


def _response(model: Any, ids: Tensor, expected: Tensor) -> float:
    """What a rounding error in the embeddings changes: much where activations are quantized or experts nearly tie."""

    def disturb(_: Any, __: Any, out: Tensor) -> Tensor:
        signs = torch.ones_like(out)
        signs[..., ::2] = -1
        return out + out * signs * torch.finfo(out.dtype).eps * 4

    hook = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        changed = _one_pass(model, ids)[:, _HEAD:]
    finally:
        hook.remove()
    return (changed - expected).abs().max().item()


def _log_probs(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)

"""Whether a model that goes on after a cached beginning computes what one pass over everything computes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from loadstone.context.prefix.base import architecture_of
from loadstone.context.prefix.cache import PrefixCache
from loadstone.errors import ArtifactError
from loadstone.loading.model_class import quiet_transformers

log = logging.getLogger(__name__)
_REMEDY = "Evaluate this model without a prefix"
_FAILURES = (RuntimeError, TypeError, AttributeError, ValueError, IndexError, ImportError)
# Tokens that are read first, and that follow: most in one call, the last in another. Tokens that are generated.
_HEAD, _TAIL, _GENERATED = 12, 5, 3
# The shorter row of the padded batch.
_SHORT = 2
# The most that log-probabilities may differ in float32.
TOLERANCE = 1e-4
# Or so many times what the model makes of a rounding error in its embeddings, up to what only an error makes.
_NOISE, _MOST = 20.0, 1.0


@dataclass(frozen=True)
class Continuation:
    """Largest differences of log-probabilities to one uncached pass: ``logits`` of several tokens after a cached
    beginning, ``generation`` of greedy tokens after them and ``padded`` of the same in a batch of two lengths (None:
    not compared). ``allowed``: the most that is taken for rounding. ``padding``: whether rows of different lengths may
    share a batch."""

    logits: float
    generation: float | None
    padded: float | None
    allowed: float
    padding: bool

    def to_json(self) -> dict[str, Any]:
        """What context.json records of the comparison."""
        return {
            "compared": f"log-probabilities of {_TAIL} tokens after {_HEAD}, and of {_GENERATED} generated after "
            "those, with one uncached pass",
            **asdict(self),
            **versions(),
        }

    @classmethod
    def from_json(cls, facts: Any) -> Continuation | None:
        """A recorded comparison; None where there is none, or other versions of the libraries made it."""
        if not isinstance(facts, dict) or any(facts.get(name) != found for name, found in versions().items()):
            return None
        values: dict[str, Any] = {item.name: facts.get(item.name) for item in fields(cls)}
        optional = {name: values[name] for name in ("generation", "padded") if values[name] is None}
        numbers = [value for name, value in values.items() if name not in (*optional, "padding")]
        if type(values["padding"]) is not bool or not all(isinstance(n, int | float) for n in numbers):
            return None
        return cls(**values)


# What was found in this process, by architecture: an error where it does not continue.
_FOUND: dict[str, Continuation | ArtifactError] = {}


def versions() -> dict[str, str]:
    """The libraries that decide how a model continues."""
    return {"torch": torch.__version__, "transformers": version("transformers")}


@torch.no_grad()
def check_continues(
    model: Any, read: Callable[[Tensor], PrefixCache], *, generates: bool = True, token: int | None = None
) -> Continuation:
    """Compare tokens after a cached beginning with one uncached pass: logits, and where the model ``generates``, greedy
    tokens, alone and in a padded batch.

    ``read`` gives the cache after ids (1, P), in the model's dtype. It is called once for each class, config and dtype
    of this process, whose answer is kept. ``token``: an id to try within the beginning. Raises ArtifactError where
    logits or generation differ; where only a padded batch does, the answer says so.
    """
    name, dtype = type(model).__name__, str(model.get_input_embeddings().weight.dtype)
    generates = generates and model.can_generate()
    key = json.dumps([name, dtype, generates, token, architecture_of(model.config)], sort_keys=True)
    if key not in _FOUND:
        try:
            _FOUND[key] = _compared(model, read, generates, token)
        except ArtifactError as error:
            _FOUND[key] = error
    found = _FOUND[key]
    if isinstance(found, ArtifactError):
        raise ArtifactError(found.message, found.remedy)
    return found


def _compared(
    model: Any, read: Callable[[Tensor], PrefixCache], generates: bool, token: int | None
) -> Continuation:
    ids = _trial_tokens(model)
    if token is not None:
        ids[0, 1] = token
    cache = read(ids[:, :_HEAD])
    expected = _one_pass(model, ids)[:, _HEAD:]
    allowed = TOLERANCE

    def rounding(apart: float) -> bool:
        nonlocal allowed
        # `<=` and not `>`: a NaN fails too.
        if not apart <= allowed:
            allowed = max(TOLERANCE, min(_NOISE * _response(model, ids, expected), _MOST))
        return apart <= allowed

    logits = _tried(model, lambda: _far(_continued(model, cache, ids), expected))
    if not rounding(logits):
        raise _differs(model, logits, "when several tokens follow a cached beginning")
    generation = padded = None
    padding = cache.takes_padding
    if generates:
        generation = _tried(model, lambda: _generated(model, cache, ids, [_TAIL]))
        if not rounding(generation):
            raise _differs(model, generation, "in tokens generated after a cached beginning")
        if padding:
            try:
                padded = _generated(model, cache, ids, [_TAIL, _SHORT])
            except _FAILURES as error:
                log.debug("%s takes no padded batch after a prefix: %s", type(model).__name__, error)
            padding = padded is not None and rounding(padded)
            padded = padded if padded is not None and math.isfinite(padded) else None
    return Continuation(logits, generation, padded, allowed, padding)


def _tried(model: Any, compare: Callable[[], float]) -> float:
    try:
        return compare()
    except _FAILURES as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{type(model).__name__} cannot read several tokens after a prefix ({reason})", _REMEDY
        ) from None


def _differs(model: Any, apart: float, when: str) -> ArtifactError:
    return ArtifactError(
        f"{type(model).__name__} does not continue after a prefix as in one pass: log-probabilities differ by "
        f"{apart:.2g} {when}",
        _REMEDY,
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


def _generated(model: Any, cache: PrefixCache, ids: Tensor, lengths: Sequence[int]) -> float:
    """Largest difference of the log-probabilities of greedy tokens, after so many of the tail in each row of a batch
    padded on the left, to one uncached pass over each row."""
    head, width = ids[:, :_HEAD], max(lengths)
    rows = [ids[0, _HEAD : _HEAD + length] for length in lengths]
    own = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    seen = torch.stack([torch.arange(width, device=ids.device) >= width - len(row) for row in rows]).long()
    begin = head.expand(len(rows), -1)
    mask = torch.cat([torch.ones_like(begin), seen], 1)
    with quiet_transformers():
        out = model.generate(
            input_ids=torch.cat([begin, own], 1),
            attention_mask=mask,
            past_key_values=cache.fork(batch=len(rows)),
            max_new_tokens=_GENERATED,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    apart = []
    for number, row in enumerate(rows):
        new = out.sequences[number, mask.shape[1] :]
        expected = _one_pass(model, torch.cat([head, row[None], new[None]], 1))[0, -len(new) - 1 : -1]
        apart.append(_far(_log_probs(torch.stack([step[number] for step in out.logits])), expected))
    # Not Python's max, which overlooks NaN.
    return torch.tensor(apart, dtype=torch.float64).max().item()


def _far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


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

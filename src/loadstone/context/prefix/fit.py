"""Reading a prompt once: from text or messages to the state of every layer after it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loadstone.artifact.files import MAX_CONFIG_BYTES, read_text
from loadstone.context.prefix.attention import NAME, register
from loadstone.context.prefix.cache import Prefix, PrefixCache, capture, text_config
from loadstone.context.prefix.continuation import Continuation, check_continues
from loadstone.context.prefix.reading import last_only
from loadstone.context.prefix.stored_states import check_kind
from loadstone.errors import ArtifactError, LoadstoneError, UsageError
from loadstone.loading.layers import hidden_parts
from loadstone.loading.loader import using
from loadstone.loading.positions import length_regime, positions, same_frequencies
from loadstone.quantization.weight_use import input_embeddings
from loadstone.text.chat import render_messages

log = logging.getLogger(__name__)
# Tokens read at once: as many as keep a device busy; the logits of the last one only are computed.
_CHUNK = {"cpu": 4096, "cuda": 16384}
# The most that joined attention may differ from concatenated, relative to the largest logit.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
# Or so many times what plain attentions differ by, up to a difference that only an error makes.
_NOISE, _MOST = 2.0, 0.25


def read_prompt(path: Path) -> str | list[dict[str, Any]]:
    """The prompt in a file: text as it stands, or of a ``.json`` file the list of chat messages in it."""
    if not path.exists():
        raise UsageError(
            f"there is no file '{path}'", "--prompt names a text file, or .json with chat messages"
        )
    text = read_text(path, MAX_CONFIG_BYTES, UsageError)
    if path.suffix.lower() != ".json":
        if not text.strip():
            raise UsageError(f"'{path}' is empty", "A prefix is at least one token")
        return text
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
        )
    ):
        raise UsageError(
            f"{path} is not a list of chat messages",
            'Example: [{"role": "system", "content": "Answer briefly."}]',
        )
    return messages


def encode_prompt(prompt: str | list[dict[str, Any]], tokenizer: Any) -> tuple[Tensor, str, bool]:
    """Token ids (1, P), the text they come from, and whether the chat template made it.

    Text is tokenized with the special tokens that the tokenizer itself adds; the template writes its own.
    """
    template = not isinstance(prompt, str)
    text = prompt if isinstance(prompt, str) else render_messages(prompt, tokenizer)
    with using(tokenizer):
        ids = tokenizer(text, add_special_tokens=not template, verbose=False)["input_ids"]
    if not ids:
        raise UsageError("the tokenizer turns the prefix into no token", "Give a longer one")
    return torch.tensor([ids], dtype=torch.long), str(text), template


@torch.no_grad()
def make_prefix(
    model: Any,
    tokens: Tensor,
    *,
    cache_kind: str | None = None,
    text: str = "",
    template: bool = False,
    tokenizer: Any = None,
    share: bool = True,
    generates: bool = True,
) -> PrefixCache:
    """Read ``tokens``, int64 (1, P), with a transformers causal model, once, and keep what its layers need of them.

    ``cache_kind``: `stored_states.CACHE_KINDS` (None: the model's dtype). ``share``: let the model's attention read the
    prefix in place where it can (`share_attention`). ``generates``: compare generation after a prefix too. Raises
    UsageError for more tokens than the model has positions, ArtifactError for layers whose state cannot be kept, for
    states that are not finite, and for a model that does not continue as in one pass (`check_continues`).
    """
    device = _token_table(model).device
    dtype = compute_dtype(model)
    kind = check_kind(cache_kind, dtype)
    length = tokens.shape[1]
    require_room(model.config, length)
    continuation = check(model, tokens, generates=generates)
    prefix = replace(
        _read(model, tokens.to(device), kind),
        text=text, template=template, tokenizer=tokenizer, padding=continuation.padding,
    )  # fmt: skip
    found = PrefixCache(prefix)
    if share:
        share_attention(found)
    return found


def _token_table(model: Any) -> Tensor:
    """The embeddings' table; raises ArtifactError for a model without one (codebooks, several parts that read text)."""
    embeddings = input_embeddings(model)
    table = getattr(embeddings, "weight", None)
    if not isinstance(table, Tensor):
        raise ArtifactError(
            f"{type(model).__name__} has no single table of token embeddings: it cannot read a prefix",
            "Evaluate this model without a prefix",
        )
    return table


def check(model: Any, tokens: Tensor, *, generates: bool = True) -> Continuation:
    """`check_continues` of a model that reads ``tokens``, with prefixes as `make_prefix` reads them."""
    # Some models count no position for a padding token, but do for each of a cached beginning.
    padding = getattr(text_config(model), "pad_token_id", None)
    token = padding if padding is not None and (tokens == padding).any() else None
    plain = str(compute_dtype(model)).removeprefix("torch.")
    return check_continues(
        model,
        lambda ids: PrefixCache(_read(model, ids, plain), share=False),
        generates=generates,
        token=token,
    )


def require_room(config: Any, length: int) -> bool:
    """Whether a prefix of ``length`` tokens and a request after it are more than a model was made for, which rotary
    embeddings allow. Raises UsageError where it has no such positions, or where they change with every token."""
    limit, extends = positions(config)
    most = same_frequencies(config, length)
    if limit is not None and length >= limit and not extends:
        raise UsageError(
            f"the prefix has {length} tokens and the model {limit} positions",
            "Shorten it: requests need room too",
        )
    if most is not None and length >= most:
        raise UsageError(
            f"the prefix has {length} tokens, and beyond {most} this model's rotary frequencies change",
            "Shorten it: keys and values keep the frequencies that they were computed with",
        )
    return limit is not None and length >= limit


def _read(model: Any, tokens: Tensor, kind: str) -> Prefix:
    """The state of every layer after ``tokens`` (1, P), keys and values stored as ``kind``."""
    from transformers import DynamicCache

    device, dtype, length = tokens.device, compute_dtype(model), tokens.shape[1]
    seen: list[Tensor] = []
    # The last hidden state makes the next token's logits; the model's own head computes them for one position.
    hooks = [
        part.register_forward_hook(lambda _, __, out: seen.append(out[0][:, -1:]))
        for part in hidden_parts(model)
    ]
    step = _CHUNK.get(device.type, _CHUNK["cuda"])
    if length_regime(model.config) is not None:
        # In parts, the first tokens would get the frequencies of short texts.
        step = length
    try:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode(False):
            for at in range(0, length, step):
                seen.clear()
                out = model(
                    input_ids=tokens[:, at : at + step],
                    past_key_values=cache,
                    use_cache=True,
                    **last_only(model),
                )
    except (LoadstoneError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: caches that a class does not know, arguments that it lacks
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise ArtifactError(
            f"{type(model).__name__} cannot read a prefix ({type(error).__name__}: {reason})",
            "Evaluate this model without a prefix",
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    if getattr(out, "past_key_values", None) is not cache or not seen:
        raise ArtifactError(
            f"{type(model).__name__} keeps its past in a way of its own",
            "Evaluate this model without a prefix",
        )
    logits = out.logits[:, -1].float()
    layers = capture(cache, length, kind)
    for number, layer in enumerate(layers):
        for name, tensor in layer.tensors().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise ArtifactError(
                    f"layer {number}: '{name}' of the prefix is not finite",
                    "The model's weights hold NaN or infinity, or the dtype overflows",
                )
    return Prefix(tokens, layers, logits, seen[-1], dtype, kind, "", False, model, None)


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype that activations have: that of the embeddings (quantized weights have dtypes of their own)."""
    dtype = model.get_input_embeddings().weight.dtype
    return dtype if dtype.is_floating_point else model.dtype


def share_attention(cache: PrefixCache) -> bool:
    """Let the model's attention read prefixes where they lie; whether it does now.

    Only for models that go through transformers' attention interface with ``sdpa``, and only where a few tokens come
    out the same as with prefix and tokens concatenated. Calls without a prefix are ``sdpa``'s, to the bit, as before.
    """
    model = cache.model
    config = text_config(model)
    if config._attn_implementation == NAME:
        return True
    full = any(layer.kind == "full" for layer in cache.prefix.layers)
    if not full or config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return False
    register()
    ids = cache.tokens[:, :1].expand(2, 4)

    def after() -> Tensor:
        out = model(input_ids=ids, past_key_values=cache.fork(batch=2, keeps=False), use_cache=True)
        return out.logits.double()  # type: ignore[no-any-return]

    def apart_from(expected: Tensor) -> float:
        return ((after() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()

    said = ""
    with torch.no_grad():
        expected = after()
        model.set_attn_implementation(NAME)
        try:
            apart = apart_from(expected)
            works = text_config(model)._attn_implementation == NAME
            # `<=` and not `>`: a NaN fails too.
            if works and not apart <= _TOLERANCE[cache.prefix.dtype]:
                # Deep models in few bits differ by more between any two attentions: what two plain ones differ by.
                model.set_attn_implementation("eager")
                works = apart <= min(_NOISE * apart_from(expected), _MOST)
                model.set_attn_implementation(NAME)
        except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
            works, said = False, " ".join(str(error).split())[:200]
    if not works:
        model.set_attn_implementation("sdpa")
        log.info("%s: prefixes are concatenated (joined attention: %s)", type(model).__name__, said or apart)
    return works

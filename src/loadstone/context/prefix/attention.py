"""Attention of many requests to one shared prefix, without a copy of the prefix for each of them.

Every request's queries see the whole prefix, so the queries of all requests are folded into one sequence that attends
to the prefix once; each request's own tokens are attended to apart, and the two results are joined by their
log-sum-exps (as in Hydragen, https://arxiv.org/abs/2402.05099, and FlashInfer's cascades). The joined result is the
same softmax, summed in another order. transformers calls this through its AttentionInterface, under the name `NAME`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "loadstone_prefix"
# Set on the keys that a prefix layer's ``update`` returns: the prefix's (keys, values), each (1, heads, rows, size).
MARK = "_loadstone_prefix"
# What an attention may ask for besides a plain softmax; none of it can be joined afterwards.
_UNJOINABLE = ("softcap", "position_bias", "s_aux")


def register() -> None:
    """Make `NAME` known to transformers, with the masks of ``sdpa``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, prefix_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def prefix_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; without a marked prefix it is ``sdpa``.

    ``query`` is (B, H, T, D), ``key`` and ``value`` (B, Hkv, S, D) are the requests' own, ``attention_mask`` None or
    boolean (B, 1, T, S). Gives (B, T, H, D).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shared = getattr(key, MARK, None)
    if shared is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    keys, values = shared
    if dropout or any(kwargs.get(name) is not None for name in _UNJOINABLE):
        key, value, mask = _concatenated(query, key, value, keys, values, attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    on_prefix, prefix_sum = attend_shared(query, keys, values, scale)
    causal = attention_mask is None and query.shape[2] > 1
    on_own, own_sum = attend(query, key, value, attention_mask, causal, scale)
    # The prefix's share of the whole softmax.
    share = (prefix_sum - own_sum).sigmoid()[..., None]
    joined = torch.lerp(on_own.to(share.dtype), on_prefix.to(share.dtype), share)
    return joined.to(query.dtype).transpose(1, 2).contiguous(), None


def attend_shared(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, T, D) queries to one prefix, (1, Hkv, P, D), which all of them see whole.

    Batch and query groups become rows of one sequence. Gives (B, H, T, Dv) and the log-sum-exps (B, H, T).
    """
    batch, heads, length, size = query.shape
    kv = keys.shape[1]
    rows = query.reshape(batch, kv, heads // kv, length, size).transpose(0, 1).reshape(1, kv, -1, size)
    out, total = attend(rows, keys, values, None, False, scale)
    shape = (kv, batch, heads // kv, length)
    out = out.reshape(*shape, -1).transpose(0, 1).reshape(batch, heads, length, -1)
    return out, total.reshape(shape).transpose(0, 1).reshape(batch, heads, length)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention with the log-sum-exp of its scores: (B, H, T, Dv) and float32 (B, H, T).

    ``key`` and ``value`` may have fewer heads. ``causal`` is for as many keys as queries. torch's kernels give the sums
    only through these names; where none fits, plain products do.
    """
    length, square = query.shape[2], query.shape[-1] == value.shape[-1]
    on_cuda = query.device.type == "cuda" and square and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if on_cuda and mask is None and query.dtype in (torch.float16, torch.bfloat16):
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return found[0], found[1][..., :length].float()
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if query.device.type == "cpu" and square:
        bias = None if mask is None else _bias(mask, query.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
    if on_cuda and query.dtype != torch.float64:
        bias = None if mask is None else _aligned(mask, query)
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, causal, scale=scale
        )
        return found[0], found[1][..., :length].float()
    return _plain(query, key, value, mask, causal, scale)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores + _bias(mask, scores.dtype)
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp().to(value.dtype) @ value, total


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    # The lowest finite number and not -inf: a row that sees nothing of its own must come out as no weight, not as NaN.
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def _aligned(mask: Tensor, query: Tensor) -> Tensor:
    """The mask as a bias of the kernel's shape, its rows padded in memory to the multiple that it wants."""
    bias = _bias(mask, query.dtype)
    width = bias.shape[-1]
    padded = torch.nn.functional.pad(bias, (0, -width % 16))[..., :width]
    return padded.expand(query.shape[0], query.shape[1], query.shape[2], width)


def _concatenated(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prefix and own tokens in one, with the mask over both."""
    batch, length, own = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(length, own, dtype=torch.bool, device=query.device).tril(own - length)
        mask = mask.expand(batch, 1, length, own)
    if mask.dtype == torch.bool:
        seen = mask.new_ones(*mask.shape[:-1], keys.shape[2])
    else:
        seen = mask.new_zeros(*mask.shape[:-1], keys.shape[2])
    return (
        torch.cat([keys.expand(batch, -1, -1, -1), key], 2),
        torch.cat([values.expand(batch, -1, -1, -1), value], 2),
        torch.cat([seen, mask], -1),
    )

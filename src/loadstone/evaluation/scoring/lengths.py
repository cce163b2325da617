"""Models whose arithmetic depends on the longest row of a batch: rotary embeddings that are scaled by the length.

transformers computes such frequencies once for a whole batch, from its largest position. Here rows share a batch only
where they get the frequencies that each gets alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from loadstone.loading.positions import Regime
from loadstone.text.tokens import Protocol


def batch_regime(regimes: Sequence[Regime | None], protocol: Protocol) -> Regime | None:
    """The regime of windows of a protocol that several models score together."""
    known = [regime for regime in regimes if regime is not None]
    before = max(protocol.prefix_tokens - 1, 0)
    return (lambda length: tuple(regime(before + int(length)) for regime in known)) if known else None


def forget_lengths(model: nn.Module) -> None:
    """Make each forward pass independent of the lengths of those before it, which "dynamic" frequencies are not."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any("dynamic" in str(kind) for kind in kinds) and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_forget)


def _forget(module: Any, args: Any) -> None:
    end = "inv_freq"
    for name in [n for n, _ in module.named_buffers(recurse=False) if n.endswith(f"original_{end}")]:
        start = name.removesuffix(f"original_{end}")
        if (
            getattr(module, f"{start}max_seq_len_cached", module.max_seq_len_cached)
            > module.original_max_seq_len
        ):
            module.register_buffer(f"{start}{end}", getattr(module, name).clone(), persistent=False)
            setattr(module, f"{start}max_seq_len_cached", module.original_max_seq_len)

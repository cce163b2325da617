"""How many positions a model has, and how its rotary frequencies depend on the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple


class Positions(NamedTuple):
    """How many positions a model was made for (None: any number), and whether it can compute more: rotary embeddings
    and ALiBi are computed for any position, learned ones are rows of a table."""

    limit: int | None
    extends: bool


def positions(config: Any) -> Positions:
    """The positions of a transformers config: of its text part where it has several."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        try:
            limit = getattr(text, name, None)
        except NotImplementedError:  # XLNet's answer for a model without a limit
            continue
        if isinstance(limit, int) and limit > 0:
            return Positions(limit, bool(getattr(text, "rope_parameters", None)) or _has_alibi(text))
    return Positions(None, True)


def _has_alibi(text: Any) -> bool:
    # MPT keeps a table of its biases.
    return text.model_type == "bloom" or getattr(text, "alibi", False) is True


# What the frequencies for so many tokens depend on: rows with equal keys may share a batch.
Regime = Callable[[int], Hashable]


def length_regime(config: Any) -> Regime | None:
    """How a model's frequencies depend on the number of tokens in a row; None where they do not."""
    text = config.get_text_config()
    dynamic, limits = _scaling(text)
    if not dynamic and not limits:
        return None

    def regime(length: int) -> Hashable:
        beyond = dynamic and length > text.max_position_embeddings
        return length if beyond else 0, tuple(length > limit for limit in limits)

    return regime


def same_frequencies(config: Any, rows: int) -> int | None:
    """The most tokens that keep the frequencies which ``rows`` tokens have; None where frequencies do not change."""
    text = config.get_text_config()
    dynamic, limits = _scaling(text)
    most = [limit for limit in limits if rows <= limit]
    if dynamic:
        # Beyond the first limit each token changes them.
        most.append(max(rows, text.max_position_embeddings))
    return min(most, default=None)


def _scaling(text: Any) -> tuple[bool, list[int]]:
    """Whether frequencies are others for each length beyond the first limit ("dynamic"), and the lengths beyond which
    there is a second set of them ("longrope")."""
    parameters = getattr(text, "rope_parameters", None) or {}
    each = (
        [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    )
    limits = [
        p.get("original_max_position_embeddings") or text.max_position_embeddings
        for p in each
        if p.get("rope_type") == "longrope"
    ]
    return any("dynamic" in str(p.get("rope_type")) for p in each), limits

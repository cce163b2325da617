"""Metrics from losses: of one model, and the paired difference of two on the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loadstone.errors import UsageError
from loadstone.evaluation.results.metrics import Estimate
from loadstone.evaluation.results.statistics import Ratio, bound, ratio, sums_between
from loadstone.text.stream import TokenStream
from loadstone.text.tokens import Protocol, resampling_units


@dataclass(frozen=True, eq=False)
class Units:
    """The units that the bootstrap resamples. ``edges``: int64 (units + 1,), where each begins among the scored tokens,
    and their number; ``bytes``: float64 (units,)."""

    edges: np.ndarray
    bytes: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """The tokens of each unit, float64 (units,)."""
        return np.diff(self.edges).astype(np.float64)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum per-token values (tokens,) within each unit, in float64."""
        return sums_between(self.edges, lambda some: values[some])


@dataclass(frozen=True, eq=False)
class Delta:
    """A model's losses minus the baseline's, paired by unit. ``units``: float64 (units, 2), the difference in nats and
    the number of tokens of each unit; ``estimates``: the metrics of group DELTA."""

    units: np.ndarray
    estimates: dict[str, Estimate]

    def loss_bound(self, level: float) -> float:
        """One-sided confidence bound of the loss difference: the true difference is below it with this probability."""
        return bound(self.units[:, 0], self.units[:, 1], level)


def make_units(stream: TokenStream, protocol: Protocol) -> Units:
    """The units that the bootstrap resamples, documents or segments of them, with their tokens and bytes."""
    edges = resampling_units(stream, protocol)
    # A segment gets the bytes of its document in proportion to its tokens.
    per_token = stream.tokens.bytes / np.maximum(stream.tokens.texts, 1)

    def bytes_of(some: slice) -> np.ndarray:
        slots = np.arange(some.start, some.stop)
        return per_token[np.searchsorted(stream.slots, slots, side="right") - 1]

    return Units(edges, sums_between(edges, bytes_of))


def measure(sums: np.ndarray, units: Units, protocol: Protocol) -> dict[str, Estimate]:
    """The metrics of group LOSS from a model's loss sums per unit, float64 (units,)."""
    total = float(sums.sum())
    loss = ratio(sums, units.tokens)
    perplexity = _exp(loss.value)
    # Bits per byte: the nats a model needs for the text, in bits, over the text's UTF-8 bytes. It is what
    # an ideal compressor driven by the model would use, and the one metric that a different tokenizer
    # leaves comparable.
    bits = ratio(sums / math.log(2), units.bytes)
    return {
        "loss": _estimate(loss),
        # First order: d exp(x) = exp(x) dx.
        "perplexity": Estimate(perplexity, perplexity * loss.stderr),
        "bits_per_byte": _estimate(bits),
        "word_perplexity": Estimate(_exp(total / protocol.words)),
        "byte_perplexity": Estimate(_exp(total / protocol.bytes)),
    }


def difference(sums: np.ndarray, baseline: np.ndarray, units: Units, protocol: Protocol) -> Delta:
    """Paired difference of two models' loss sums per unit, float64 (units,) both."""
    apart = sums - baseline
    tokens = units.tokens.sum()
    loss = ratio(apart, units.tokens)
    estimates = {
        "delta_loss": _estimate(loss),
        "delta_perplexity": Estimate(_exp(float(sums.sum() / tokens)) - _exp(float(baseline.sum() / tokens))),
        "delta_perplexity_relative": Estimate(_exp(loss.value) - 1),
        "delta_bits_per_byte": Estimate(float(apart.sum() / math.log(2) / protocol.bytes)),
    }
    return Delta(np.stack([apart, units.tokens], axis=1), estimates)


def _estimate(value: Ratio) -> Estimate:
    return Estimate(value.value, value.stderr, (value.lower, value.upper))


def require_same(a: Protocol, b: Protocol, names: tuple[str, str]) -> None:
    """Refuse a comparison of results whose data or protocol differ (UsageError naming the fields)."""
    fields = a.differences(b)
    if not fields:
        return
    if "tokens_sha256" in fields and "data_sha256" not in fields and a.separator_id == b.separator_id:
        raise UsageError(
            f"'{names[0]}' and '{names[1]}' tokenize the text differently: their losses do not compare",
            "Evaluate them one at a time and compare bits_per_byte",
        )
    shown = "; ".join(f"{f} {_short(getattr(a, f))} against {_short(getattr(b, f))}" for f in fields)
    raise UsageError(
        f"'{names[0]}' and '{names[1]}' were evaluated differently: {shown}", "Use one protocol for both"
    )


def _short(value: object) -> str:
    return f"{value:.12}" if isinstance(value, str) else str(value)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

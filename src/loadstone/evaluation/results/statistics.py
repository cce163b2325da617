"""Standard errors and confidence intervals by block bootstrap over documents.

Tokens of one document are not independent, so documents (or long segments, when there are few documents) are
resampled, never tokens. Every figure here is a ratio of sums, such as nats over tokens, so a replicate draws
documents with replacement and divides its sums. Differences are paired: both models' losses of a document are
drawn together, which takes the difficulty of the text out of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

REPLICATES = 2000
# Per-token values that are widened to float64 at once.
_BLOCK = 1 << 20
SEED = 20240229


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums and its sampling error. ``lower``/``upper`` bound the central 95 % interval."""

    value: float
    stderr: float
    lower: float
    upper: float
    units: int


def sums_between(edges: np.ndarray, values: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Sums in float64 of per-token values between neighbouring ``edges``, int64 (n + 1,), ascending: float64 (n,).

    ``values`` gives those of some tokens, of a million at a time rather than of all.
    """
    sums = np.empty(len(edges) - 1)
    at = 0
    while at < len(sums):
        end = max(at + 1, int(np.searchsorted(edges, edges[at] + _BLOCK, side="right")) - 1)
        some = values(slice(int(edges[at]), int(edges[end]))).astype(np.float64)
        owner = np.repeat(np.arange(end - at), np.diff(edges[at : end + 1]))
        sums[at:end] = np.bincount(owner, weights=some, minlength=end - at)
        at = end
    return sums


@lru_cache(maxsize=4)
def _weights(units: int) -> np.ndarray:
    """How often each unit is drawn in each replicate: float64 (REPLICATES, units). Seeded: the same for
    every model."""
    draws = np.random.default_rng(SEED).multinomial(units, np.full(units, 1 / units), size=REPLICATES)
    return draws.astype(np.float64)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Ratio:
    """Σ numerator / Σ denominator over units (both float (units,)), with a studentized bootstrap interval."""
    value = float(numerator.sum() / denominator.sum())
    if len(numerator) < 2:
        return Ratio(value, float("nan"), float("nan"), float("nan"), len(numerator))
    replicates, _ = _replicates(numerator, denominator)
    lower, upper = bound(numerator, denominator, 0.025), bound(numerator, denominator, 0.975)
    return Ratio(value, float(replicates.std(ddof=1)), lower, upper, len(numerator))


def bound(numerator: np.ndarray, denominator: np.ndarray, level: float) -> float:
    """The value that the true ratio lies below with probability ``level`` (one-sided confidence bound).

    Studentized (bootstrap-t): each replicate's deviation is measured in its own standard error, which keeps
    the stated level for the skewed, heavy-tailed losses of real documents where plain percentiles are too
    narrow.
    """
    units = len(numerator)
    if units < 2:
        return float("nan")
    value = numerator.sum() / denominator.sum()
    error = _linear_error(numerator, denominator, value)
    if error == 0.0:
        return float(value)
    replicates, errors = _replicates(numerator, denominator)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (replicates - value) / errors
    # A replicate that drew a single unit has no spread, and no scale.
    t = t[np.isfinite(t)]
    if not len(t):
        # Equal units, up to rounding: none of the replicates has a spread.
        return float(value)
    # The level itself has a sampling error with this many replicates: add it, to stay on the safe side.
    slack = np.sqrt(level * (1 - level) / max(len(t), 1))
    wanted = np.clip(1 - level + (slack if level < 0.5 else -slack), 0, 1)
    quantile = np.quantile(t, wanted)
    return float(value - quantile * error)


def _linear_error(numerator: np.ndarray, denominator: np.ndarray, value: float) -> float:
    units = len(numerator)
    residual = numerator - value * denominator
    return float(np.sqrt((residual**2).sum() * units / (units - 1)) / denominator.sum())


def _replicates(numerator: np.ndarray, denominator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each replicate's ratio and its own linearized standard error, float64 (REPLICATES,) both."""
    weights, units = _weights(len(numerator)), len(numerator)
    top, bottom = weights @ numerator, weights @ denominator
    value = top / bottom
    squares = (
        weights @ numerator**2
        - 2 * value * (weights @ (numerator * denominator))
        + value**2 * (weights @ denominator**2)
    )
    return value, np.sqrt(np.maximum(squares, 0) * units / (units - 1)) / bottom

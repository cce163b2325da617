from __future__ import annotations

import math

import numpy as np
import pytest

from loadstone.evaluation.results.statistics import bound, ratio


def documents(rng: np.random.Generator, count: int, mean: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Loss sums and lengths of documents, with lengths and difficulty as uneven as real ones."""
    tokens = np.round(np.exp(rng.normal(5.5, 0.8, count))) + 1
    losses = mean + rng.gamma(2.0, 0.2, count) - 0.4 + rng.normal(0, 1, count) / np.sqrt(tokens)
    return losses * tokens, tokens


def test_value_and_stderr_are_those_of_the_ratio() -> None:
    sums, tokens = documents(np.random.default_rng(1), 300)
    result = ratio(sums, tokens)
    assert result.value == pytest.approx(sums.sum() / tokens.sum(), rel=1e-12)
    residual = sums - result.value * tokens
    assert result.stderr == pytest.approx(np.sqrt((residual**2).sum()) / tokens.sum(), rel=0.06)
    assert result.lower < result.value < result.upper and result.units == 300


def test_documents_are_resampled_not_tokens() -> None:
    """Splitting each document in ten equal parts would shrink a token-wise error by sqrt(10); ours must
    not move."""
    sums, tokens = documents(np.random.default_rng(2), 100)
    doubled = ratio(np.repeat(sums, 2) / 2, np.repeat(tokens, 2) / 2)
    assert doubled.stderr < 0.8 * ratio(sums, tokens).stderr
    assert ratio(10 * sums, 10 * tokens).stderr == pytest.approx(ratio(sums, tokens).stderr, rel=1e-9)


def test_pairing_takes_out_the_difficulty_of_the_text() -> None:
    rng = np.random.default_rng(3)
    a, tokens = documents(rng, 100)
    b = a + tokens * 0.02 + rng.normal(0, 0.05, 100) * np.sqrt(tokens)
    assert ratio(b - a, tokens).stderr < 0.1 * ratio(a, tokens).stderr


def test_intervals_cover() -> None:
    """The true difference lies inside 95 % intervals 95 % of the time, for skewed documents and few of
    them."""
    rng = np.random.default_rng(4)
    inside = 0
    trials = 400
    for _ in range(trials):
        tokens = np.round(np.exp(rng.normal(5.5, 0.8, 60))) + 1
        effect = 0.03 + 0.03 * (rng.gamma(1.0, 1.0, 60) - 1.0)
        result = ratio(effect * tokens, tokens)
        inside += result.lower <= 0.03 <= result.upper
    assert 0.92 <= inside / trials <= 0.985


def test_bounds_are_ordered_and_one_sided() -> None:
    sums, tokens = documents(np.random.default_rng(5), 80)
    levels = [bound(sums, tokens, level) for level in (0.01, 0.05, 0.5, 0.95, 0.99)]
    assert levels == sorted(levels)
    assert levels[1] < sums.sum() / tokens.sum() < levels[3]


def test_edge_cases() -> None:
    one = ratio(np.array([3.0]), np.array([2.0]))
    assert one.value == 1.5 and math.isnan(one.stderr) and math.isnan(one.upper)
    same = ratio(np.zeros(10), np.arange(1.0, 11.0))
    assert (same.value, same.stderr, same.lower, same.upper) == (0.0, 0.0, 0.0, 0.0)
    # Equal up to rounding.
    alike = ratio(np.full(6, 754.1203125), np.full(6, 127.0))
    nearly = ratio(np.array([0.1 + 0.2, 0.3, 0.3]), np.full(3, 0.1 * 3))
    assert all(math.isfinite(bound) for found in (alike, nearly) for bound in (found.lower, found.upper))
    two = ratio(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    assert two.value == 1.5 and math.isfinite(two.lower)


def test_seeded() -> None:
    sums, tokens = documents(np.random.default_rng(6), 50)
    assert ratio(sums, tokens) == ratio(sums.copy(), tokens.copy())

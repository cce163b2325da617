"""Calibration of `--fail-if 'dloss>0.03@95'` by seeded simulation.

python tests/bench/bench_gate.py [--trials 2000]

Each trial draws documents as uneven as real ones: lengths log-normal, a per-document effect of quantization
that is skewed (gamma) and grows with length or does not, and token noise. A true difference at the limit
must fail at most 5 % of the time; the power column says how often a true difference of 0.03 + EFFECT is
caught.
"""

from __future__ import annotations

import argparse

import numpy as np

from loadstone.evaluation.results.compare import Delta
from loadstone.evaluation.results.gates import Gate, judge, parse_gate

LIMIT, EFFECT = 0.03, 0.02
# Spread of a document's mean difference, and of a token's: as measured for int4 weights on SmolLM2-135M.
DOCUMENT_SPREAD, TOKEN_SPREAD = 0.04, 0.35
SHAPE = 2.0  # of the gamma: skewness 1.4


def draw(rng: np.random.Generator, documents: int, truth: float, length_effect: float) -> np.ndarray:
    """Differences and tokens per document, float64 (documents, 2), whose true ratio is ``truth``."""
    tokens = np.round(np.exp(rng.normal(6.3, 0.6, documents))) + 1
    # E[tokens ** p] of the log-normal in closed form centres the length effect at 0, weighted by tokens.
    centre = np.exp(0.6**2)
    skewed = DOCUMENT_SPREAD * (rng.gamma(SHAPE, 1.0, documents) - SHAPE) / np.sqrt(SHAPE)
    long = length_effect * (tokens / np.exp(6.3 + 0.6**2 / 2) - centre)
    noise = rng.normal(0, TOKEN_SPREAD, documents) / np.sqrt(tokens)
    return np.stack([(truth + skewed + long + noise) * tokens, tokens], axis=1)


def fails(gate: Gate, sums: np.ndarray) -> bool:
    return judge(gate, "simulated", {}, Delta(sums, {})).failed


def rate(documents: int, truth: float, length_effect: float, trials: int, seed: int = 1) -> float:
    """How often the gate fails."""
    rng = np.random.default_rng(seed)
    gate = parse_gate(f"dloss>{LIMIT}@95")
    return float(np.mean([fails(gate, draw(rng, documents, truth, length_effect)) for _ in range(trials)]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    print(f"{trials} trials; gate dloss>{LIMIT}@95")
    print(f"{'documents':>10}{'length effect':>15}{'false failures':>16}{f'power at +{EFFECT}':>17}")
    for documents in (30, 96, 300):
        for effect in (0.0, 0.02):
            false, power = (rate(documents, truth, effect, trials) for truth in (LIMIT, LIMIT + EFFECT))
            print(f"{documents:>10}{effect:>15}{100 * false:>14.1f} %{100 * power:>15.1f} %")


if __name__ == "__main__":
    main()

"""How good predictions are. Numpy only; each function says what it is in one line."""

from __future__ import annotations

import numpy as np

# Central intervals whose coverage is reported.
LEVELS = (0.5, 0.8, 0.9, 0.95)
_BINS = 10


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Of class probabilities (rows, classes) against true positions (rows,); -1 is a class never seen in training.

    ``accuracy``; ``log_loss`` in nats (probabilities clipped at 1e-15, a class never seen costs that too);
    ``auc``: area under the ROC curve, of the mean one-against-rest kind for more than two classes, None when undefined;
    ``calibration_error``: mean gap between confidence and accuracy over ten equal bins of confidence.
    """
    rows = len(labels)
    own = np.where(labels >= 0, probabilities[np.arange(rows), labels], 0.0)
    guess = probabilities.argmax(1)
    return {
        "accuracy": float((guess == labels).mean()),
        "log_loss": float(-np.log(np.clip(own, 1e-15, 1)).mean()),
        "auc": _auc(probabilities, labels),
        "calibration_error": _calibration_error(probabilities.max(1), guess == labels),
    }


def regression_metrics(
    mean: np.ndarray, log_prob: np.ndarray, cdf: np.ndarray, y: np.ndarray
) -> dict[str, float | None]:
    """Of predictive means, log densities and distribution values at the targets ``y`` (all (rows,)).

    ``r2`` (None for constant targets); ``rmse`` and ``mae`` in the target's units; ``nll``: mean negative log density
    in nats; ``coverage_90`` and the like: share of targets within the central 90 % interval; ``calibration_error``:
    mean gap between those shares and their levels.
    """
    error, spread = y - mean, y - y.mean()
    total = float((spread**2).sum())
    coverage = {level: float((np.abs(cdf - 0.5) <= level / 2).mean()) for level in LEVELS}
    return {
        "r2": 1 - float((error**2).sum()) / total if total > 0 else None,
        "rmse": float(np.sqrt((error**2).mean())),
        "mae": float(np.abs(error).mean()),
        "nll": float(-log_prob.mean()),
        **{f"coverage_{round(100 * level)}": share for level, share in coverage.items()},
        "calibration_error": float(np.mean([abs(share - level) for level, share in coverage.items()])),
    }


def _auc(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    if probabilities.shape[1] == 2:
        return _binary_auc(probabilities[:, 1], labels == 1)
    each = [_binary_auc(probabilities[:, k], labels == k) for k in range(probabilities.shape[1])]
    defined = [area for area in each if area is not None]
    return float(np.mean(defined)) if defined and len(defined) == len(each) else None


def _binary_auc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """By ranks (Mann and Whitney), ties halved; None when one of the two kinds is absent."""
    count = int(positive.sum())
    if count in (0, len(positive)):
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return float((rank[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def _calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
        for b in range(_BINS)
        if (bins == b).any()
    ]
    return float(np.sum(gaps))

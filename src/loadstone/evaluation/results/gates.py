"""``--fail-if``: limits that make a run fail, such as ``dloss>0.03``, ``dppl>1%`` or ``dloss>0.03@95``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from loadstone.errors import UsageError

# Metric -> the key of a model's JSON record that holds it. `d…` metrics compare with the baseline.
METRICS = {
    "loss": "loss",
    "ppl": "perplexity",
    "bpb": "bits_per_byte",
    "dloss": "delta_loss",
    "dppl": "delta_perplexity",
    "dbpb": "delta_bits_per_byte",
    "kl": "kl",
    "kl99": "kl_p99",
    "top1": "top1_agreement",
}
COMPARING = ("dloss", "dppl", "dbpb", "kl", "kl99", "top1")
DIVERGENCE = ("kl", "kl99", "top1")
GRAMMAR = (
    "METRIC > NUMBER[%][@CONFIDENCE] (or >=, <, <=), METRIC one of " + ", ".join(METRICS) + "; "
    "examples: 'dloss>0.03', 'ppl>20', 'dppl>1%', 'dloss>0.03@95', 'top1<98%'"
)
_FORM = re.compile(
    r"\s*(?P<metric>[a-z0-9_]+)\s*(?P<op>>=|<=|>|<)\s*(?P<limit>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"
    r"\s*(?P<percent>%)?\s*(?:@\s*(?P<confidence>\d+(?:\.\d+)?)\s*%?)?\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Gate:
    """A limit. ``confidence`` (percent) asks for the one-sided bound, not the estimate, to cross the
    limit."""

    text: str
    metric: str
    operator: str
    limit: float
    percent: bool
    confidence: float | None

    @property
    def compares(self) -> bool:
        """Whether the gate needs a baseline."""
        return self.metric in COMPARING


@dataclass(frozen=True)
class Verdict:
    """A gate's outcome for one model. ``value`` is what was compared: the estimate, or its confidence
    bound."""

    gate: str
    model: str
    value: float
    limit: float
    failed: bool

    def describe(self) -> str:
        if not math.isfinite(self.value):
            return f"{self.model}: {self.gate} failed: it cannot be told ({self.value})"
        by = abs(self.value - self.limit)
        return f"{self.model}: {self.gate} failed by {by:.4g} ({self.value:.6g} against {self.limit:.6g})"


def parse_gate(text: str) -> Gate:
    """Parse a gate. Raises UsageError with the grammar."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(f"--fail-if {text!r} is not a gate", f"The form is {GRAMMAR}")
    metric = match["metric"].lower()
    if metric not in METRICS:
        raise UsageError(f"--fail-if {text!r}: unknown metric {metric!r}", f"The form is {GRAMMAR}")
    percent, confidence = bool(match["percent"]), match["confidence"]
    if percent and metric not in ("dloss", "dppl", "dbpb", "top1"):
        raise UsageError(
            f"--fail-if {text!r}: {metric} has no baseline to be a percentage of", f"The form is {GRAMMAR}"
        )
    if confidence is not None:
        if (
            metric not in ("dloss", "dppl")
            or (metric == "dppl" and not percent)
            or (metric == "dloss" and percent)
        ):
            raise UsageError(
                f"--fail-if {text!r}: @CONFIDENCE goes with dloss in nats and dppl in percent",
                f"The form is {GRAMMAR}",
            )
        if not 50 <= float(confidence) < 100:
            raise UsageError(f"--fail-if {text!r}: the confidence must be at least 50 and below 100 percent")
    return Gate(
        text.strip(),
        metric,
        match["op"],
        float(match["limit"]),
        percent,
        float(confidence) if confidence else None,
    )


def judge(gate: Gate, record: dict[str, Any], delta: Any = None) -> Verdict:
    """Hold a model's JSON record against a gate; ``delta`` is its `compare.Delta` where there is a baseline.

    A figure that is not finite fails every gate.
    """
    value = _value(gate, record, delta)
    crossed = {
        ">": value > gate.limit,
        ">=": value >= gate.limit,
        "<": value < gate.limit,
        "<=": value <= gate.limit,
    }[gate.operator]
    return Verdict(gate.text, str(record["path"]), value, gate.limit, crossed or not math.isfinite(value))


def _value(gate: Gate, record: dict[str, Any], delta: Any) -> float:
    if gate.confidence is not None:
        # The gate fails only if even the favourable end of the interval is beyond the limit.
        level = gate.confidence / 100
        nats = delta.loss_bound(1 - level if gate.operator.startswith(">") else level)
        return float(nats) if gate.metric == "dloss" else 100 * math.expm1(nats)
    value = record.get(METRICS[gate.metric])
    if value is None:
        return math.nan
    if not gate.percent:
        return float(value)
    if gate.metric == "top1":
        return 100 * float(value)
    if gate.metric == "dppl":
        return 100 * float(delta.relative_perplexity)
    whole = record["loss" if gate.metric == "dloss" else "bits_per_byte"]
    return 100 * value / (whole - value)

"""``--fail-if``: limits that make a run fail, such as ``dloss>0.03``, ``dppl>1%``, ``dloss>0.03@95`` or
``accuracy<0.9``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from loadstone.errors import UsageError
from loadstone.evaluation.results.metrics import BY_GATE, DELTA, DIVERGENCE, Metric, gate_names

_OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
GRAMMAR = (
    "METRIC > NUMBER[%][@CONFIDENCE] (or >=, <, <=), METRIC one of " + ", ".join(BY_GATE) + "; "
    "examples: 'dloss>0.03', 'ppl>20', 'dppl>1%', 'dloss>0.03@95', 'top1<98%', 'accuracy<0.9'"
)
_FORM = re.compile(
    r"\s*(?P<metric>[a-z0-9_]+)\s*(?P<op>>=|<=|>|<)\s*(?P<limit>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"
    r"\s*(?P<percent>%)?\s*(?:@\s*(?P<confidence>\d+(?:\.\d+)?)\s*%?)?\s*",
    re.IGNORECASE,
)


class LossDifference(Protocol):
    """What a gate with a confidence needs of the paired difference of two models."""

    def loss_bound(self, level: float) -> float:
        """One-sided confidence bound of the loss difference."""


@dataclass(frozen=True)
class Gate:
    """A limit on a metric. ``confidence`` (percent): the gate fails only if the one-sided confidence bound, not just
    the estimate, is beyond the limit."""

    text: str
    metric: Metric
    operator: str
    limit: float
    percent: bool
    confidence: float | None

    @property
    def compares(self) -> bool:
        """Whether the gate needs a baseline."""
        return bool({DELTA, DIVERGENCE} & set(self.metric.groups))

    @property
    def needs_divergence(self) -> bool:
        """Whether the gate needs the predictions of both models, as ``--kl`` does."""
        return DIVERGENCE in self.metric.groups


@dataclass(frozen=True)
class Verdict:
    """The outcome of a gate for one model. ``value``: what was compared with the limit, the estimate or its confidence
    bound."""

    gate: str
    model: str
    value: float
    limit: float
    failed: bool

    def describe(self) -> str:
        """One line on a failed gate."""
        if not math.isfinite(self.value):
            return f"{self.model}: {self.gate} failed: the value cannot be determined ({self.value})"
        by = abs(self.value - self.limit)
        return f"{self.model}: {self.gate} failed by {by:.4g} ({self.value:.6g} against {self.limit:.6g})"


def parse_gate(text: str) -> Gate:
    """Parse a gate. Raises UsageError with the grammar."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(f"--fail-if {text!r} is not a gate", f"The form is {GRAMMAR}")
    metric = BY_GATE.get(match["metric"].lower())
    if metric is None:
        raise UsageError(f"--fail-if {text!r}: unknown metric {match['metric']!r}", f"The form is {GRAMMAR}")
    percent, confidence = bool(match["percent"]), match["confidence"]
    if percent and not (metric.relative_to or metric.fraction):
        raise UsageError(
            f"--fail-if {text!r}: {metric.gate} is neither a fraction nor relative to a baseline, so % has no meaning",
            f"The form is {GRAMMAR}",
        )
    if confidence is not None:
        if metric.confidence != ("relative" if percent else "absolute"):
            raise UsageError(
                f"--fail-if {text!r}: @CONFIDENCE goes with dloss in nats and dppl in percent",
                f"The form is {GRAMMAR}",
            )
        if not 50 <= float(confidence) < 100:
            raise UsageError(f"--fail-if {text!r}: the confidence must be at least 50 and below 100 percent")
    limit = float(match["limit"])
    return Gate(text.strip(), metric, match["op"], limit, percent, float(confidence) if confidence else None)


def check_gates(gates: Collection[Gate], groups: Collection[str], what: str) -> None:
    """Raise UsageError for a gate on a metric that is in none of ``groups``: what is evaluated does not have it."""
    for gate in gates:
        if not set(gate.metric.groups) & set(groups):
            raise UsageError(
                f"--fail-if '{gate.text}': {what} has no {gate.metric.gate}",
                f"It has {', '.join(gate_names(groups))}",
            )


def judge(gate: Gate, model: str, figures: Mapping[str, Any], delta: LossDifference | None = None) -> Verdict:
    """Compare a model's metrics with a gate's limit. ``figures``: metrics by JSON key; ``delta``: the paired difference
    to the baseline, which gates with a confidence need. A value that is not finite fails every gate."""
    value = _value(gate, figures, delta)
    crossed = _OPERATORS[gate.operator](value, gate.limit)
    return Verdict(gate.text, model, value, gate.limit, crossed or not math.isfinite(value))


def _value(gate: Gate, figures: Mapping[str, Any], delta: LossDifference | None) -> float:
    metric = gate.metric
    if gate.confidence is not None:
        assert delta is not None
        # The gate fails only if even the favourable end of the interval is beyond the limit.
        level = gate.confidence / 100
        nats = float(delta.loss_bound(1 - level if gate.operator.startswith(">") else level))
        return 100 * math.expm1(nats) if gate.percent else nats
    value = figures.get(metric.key)
    if value is None:
        return math.nan
    if not gate.percent:
        return float(value)
    if metric.fraction:
        return 100 * float(value)
    whole = figures.get(metric.relative_to)
    return math.nan if whole is None else 100 * value / (whole - value)

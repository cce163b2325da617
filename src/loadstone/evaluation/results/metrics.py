"""The one table of metrics: tables, reports, gates, the JSON record and the documentation read it.

To add a metric, add a row here and compute it where the others of its group are computed: `compare.measure` and
`compare.difference` (losses), `divergence_record` (KL), `scoring.speed`, or ``context.tables.metrics`` (fitted tables).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Groups: which evaluations have a metric.
LOSS, DELTA, DIVERGENCE, COST, SPEED = "loss", "delta", "divergence", "cost", "speed"
CLASSIFICATION, REGRESSION = "classification", "regression"
TEXT_GROUPS = (LOSS, DELTA, DIVERGENCE)
TABLE_GROUPS = (CLASSIFICATION, REGRESSION)


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    ``key``: its name in the JSON record. ``groups``: where it is measured. ``doc``: one line for people. ``unit``: of
    the value in the record. ``better``: ``lower``, ``higher`` or empty. ``heading``: its column; without one it is in
    the record only. ``form``, ``scale``, ``suffix``: how a cell shows it, as ``format(scale * value, form) + suffix``.
    ``missing``: the cell of a value that is null. ``stderr``, ``interval``: whether the record also has ``KEY_stderr``
    and ``KEY_interval95``. ``gate``: its name in ``--fail-if``; empty when gates may not use it. ``relative_to``: the
    metric that a gate's ``%`` is a percentage of; ``fraction``: ``%`` is a hundredth. ``confidence``: whether gates may
    ask for a confidence bound, of the value itself (``absolute``) or of its percentage (``relative``). ``report_only``:
    a column of the HTML report, not of the terminal."""

    key: str
    groups: tuple[str, ...]
    doc: str
    unit: str = ""
    better: str = ""
    heading: str = ""
    form: str = ".4f"
    scale: float = 1.0
    suffix: str = ""
    missing: str = ""
    stderr: bool = False
    interval: bool = False
    gate: str = ""
    relative_to: str = ""
    fraction: bool = False
    confidence: str = ""
    report_only: bool = False

    def cell(self, figures: Mapping[str, Any]) -> str:
        """The metric as text, with its standard error where there is one; empty when it was not measured."""
        if self.key not in figures:
            return ""
        value, error = figures[self.key], figures.get(f"{self.key}_stderr")
        if value is None:
            return self.missing
        text = format(self.scale * value, self.form)
        if self.stderr and error is not None:
            text += f" ± {self.scale * error:{self.form.lstrip('+')}}"
        return text + self.suffix


def _quantile(key: str, level: str, **options: Any) -> Metric:
    which = {"median": "median", "max": "largest value"}.get(level, f"{level} quantile")
    doc = f"{which} of KL(baseline ‖ model) over all tokens"
    return Metric(key, (DIVERGENCE,), doc, "nats", "lower", heading=level, form=".4g", **options)


def _coverage(percent: int) -> Metric:
    doc = f"share of targets within the central {percent} % interval"
    return Metric(
        f"coverage_{percent}", (REGRESSION,), doc, "fraction", heading=f"coverage_{percent}", fraction=True,
        gate=f"coverage_{percent}",
    )  # fmt: skip


METRICS: tuple[Metric, ...] = (
    Metric(
        "loss", (LOSS,), "mean negative log-likelihood", "nats per token", "lower", heading="loss", stderr=True,
        interval=True, gate="loss",
    ),
    Metric(
        "perplexity", (LOSS,), "exponential of the loss", "per token", "lower", heading="perplexity", form=".3f",
        missing="inf", stderr=True, gate="ppl",
    ),
    Metric(
        "bits_per_byte", (LOSS,), "bits for the whole text over its UTF-8 bytes; does not depend on the tokenizer",
        "bits per byte", "lower", heading="bits/byte", stderr=True, gate="bpb",
    ),
    Metric("word_perplexity", (LOSS,), "perplexity by whitespace-separated words, as in lm-eval", "per word", "lower"),
    Metric("byte_perplexity", (LOSS,), "perplexity by UTF-8 bytes, as in lm-eval", "per byte", "lower"),
    Metric(
        "delta_loss", (DELTA,), "loss minus the baseline's, paired", "nats per token", "lower", heading="Δ loss",
        form="+.4f", missing="reference", stderr=True, interval=True, gate="dloss", relative_to="loss",
        confidence="absolute",
    ),
    Metric(
        "delta_perplexity", (DELTA,), "perplexity minus the baseline's", "per token", "lower", gate="dppl",
        relative_to="perplexity", confidence="relative",
    ),
    Metric(
        "delta_perplexity_relative", (DELTA,), "the same over the baseline's: 0.01 is 1 %", "fraction", "lower",
        heading="Δ ppl", form="+.2f", scale=100, suffix=" %", missing="inf",
    ),
    Metric(
        "delta_bits_per_byte", (DELTA,), "bits per byte minus the baseline's", "bits per byte", "lower", gate="dbpb",
        relative_to="bits_per_byte",
    ),
    Metric(
        "kl", (DIVERGENCE,), "mean KL(baseline ‖ model)", "nats per token", "lower", heading="KL", form=".5f",
        stderr=True, gate="kl",
    ),
    Metric(
        "kl_reverse", (DIVERGENCE,), "mean KL(model ‖ baseline)", "nats per token", "lower", heading="KL reverse",
        form=".5f", stderr=True,
    ),
    _quantile("kl_median", "median"),
    _quantile("kl_p90", "90 %"),
    _quantile("kl_p99", "99 %", gate="kl99"),
    _quantile("kl_p999", "99.9 %"),
    _quantile("kl_max", "max"),
    Metric(
        "top1_agreement", (DIVERGENCE,), "share of tokens where both models predict the same token first", "fraction",
        "higher", heading="same top-1", form=".2f", scale=100, suffix=" %", stderr=True, fraction=True, gate="top1",
    ),
    Metric(
        "tokens_per_second", (COST,), "of the scoring pass; null when nothing was computed", "tokens per second",
        "higher", heading="tokens/s", form=".0f",
    ),
    Metric(
        "peak_memory_bytes", (COST, SPEED), "tensors on a GPU, the whole process on a CPU", "bytes", "lower",
        heading="peak MiB", form=".0f", scale=2**-20,
    ),
    Metric("load_seconds", (COST,), "time to load the model", "seconds", "lower", heading="load s", form=".1f"),
    Metric(
        "weight_bytes", (COST,), "size of the weight files", "bytes", "lower", heading="size MB", form=".1f",
        scale=1e-6, report_only=True,
    ),
    Metric("bits_per_parameter", (COST,), "of the weight files", "bits", "lower"),
    Metric(
        "prefill_tokens_per_second", (SPEED,), "reading prompts, all sequences together", "tokens per second",
        "higher", heading="prefill tokens/s", form=".0f",
    ),
    Metric(
        "first_token_seconds", (SPEED,), "time to the first token", "seconds", "lower", heading="first token ms",
        form=".0f", scale=1000,
    ),
    Metric(
        "decode_tokens_per_second", (SPEED,), "writing tokens, all sequences together", "tokens per second", "higher",
        heading="decode tokens/s", form=".1f",
    ),
    Metric(
        "accuracy", (CLASSIFICATION,), "share of rows whose most likely class is the true one", "fraction", "higher",
        heading="accuracy", missing="-", fraction=True, gate="accuracy",
    ),
    Metric(
        "log_loss", (CLASSIFICATION,), "mean negative log probability of the true class", "nats", "lower",
        heading="log_loss", missing="-", gate="log_loss",
    ),
    Metric(
        "auc", (CLASSIFICATION,), "area under the ROC curve, mean of one against rest; null when undefined", "",
        "higher", heading="auc", missing="-", gate="auc",
    ),
    Metric(
        "r2", (REGRESSION,), "coefficient of determination; null for constant targets", "", "higher", heading="r2",
        missing="-", gate="r2",
    ),
    Metric(
        "rmse", (REGRESSION,), "root mean squared error", "the target's", "lower", heading="rmse", missing="-",
        gate="rmse",
    ),
    Metric(
        "mae", (REGRESSION,), "mean absolute error", "the target's", "lower", heading="mae", missing="-", gate="mae"
    ),
    Metric(
        "nll", (REGRESSION,), "mean negative log density of the targets", "nats", "lower", heading="nll", missing="-",
        gate="nll",
    ),
    *map(_coverage, (50, 80, 90, 95)),
    Metric(
        "calibration_error", TABLE_GROUPS, "mean gap between stated probabilities and observed shares", "fraction",
        "lower", heading="calibration_error", missing="-", gate="calibration_error",
    ),
)  # fmt: skip
BY_GATE = {metric.gate: metric for metric in METRICS if metric.gate}


@dataclass(frozen=True)
class Estimate:
    """A measured value; ``stderr`` its standard error, ``interval`` its 95 % confidence interval, where known."""

    value: float
    stderr: float | None = None
    interval: tuple[float, float] | None = None


def columns(*groups: str, report: bool = False) -> list[Metric]:
    """The metrics of some groups that are columns of a table."""
    return [m for m in METRICS if m.heading and set(m.groups) & set(groups) and (report or not m.report_only)]


def to_record(group: str, estimates: Mapping[str, Estimate] | None) -> dict[str, Any]:
    """The JSON keys of a group of metrics; null for what is not finite, and for all of them without ``estimates``."""
    record: dict[str, Any] = {}
    for metric in METRICS:
        if group not in metric.groups:
            continue
        estimate = None if estimates is None else estimates[metric.key]
        record[metric.key] = None if estimate is None else finite(estimate.value)
        if metric.stderr:
            record[f"{metric.key}_stderr"] = None if estimate is None else finite(estimate.stderr)
        if metric.interval:
            ends = None if estimate is None else estimate.interval
            record[f"{metric.key}_interval95"] = None if ends is None else [finite(end) for end in ends]
    return record


def finite(value: float | None) -> float | None:
    """The value, or None when it is infinite or NaN: JSON has neither."""
    return value if value is not None and abs(value) < float("inf") else None


def gate_names(groups: Iterable[str]) -> list[str]:
    """The names that gates use for the metrics of some groups."""
    wanted = set(groups)
    return [m.gate for m in METRICS if m.gate and wanted & set(m.groups)]


def markdown() -> list[str]:
    """The table of docs/eval.md, one line for each metric."""
    lines = ["| JSON key | `--fail-if` | unit | better | is |", "|---|---|---|---|---|"]
    for m in METRICS:
        gate = f"`{m.gate}`" if m.gate else ""
        lines.append(f"| `{m.key}` | {gate} | {m.unit} | {m.better} | {m.doc} |")
    return lines

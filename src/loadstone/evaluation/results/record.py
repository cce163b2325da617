"""A model's entry in the JSON result. Names are frozen once released; what was not measured is null."""

from __future__ import annotations

import math
from typing import Any

from loadstone.evaluation.models import Subject
from loadstone.evaluation.passes import Cost
from loadstone.evaluation.results.compare import Delta, Figures
from loadstone.text.tokens import Protocol


def make_record(
    subject: Subject, protocol: Protocol, cost: Cost, figures: Figures, delta: Delta | None
) -> dict[str, Any]:
    """The record of one model; ``delta`` is its difference to the reference, None for the reference
    itself."""
    artifact = subject.plan.artifact
    stored = sum((artifact.path / file).stat().st_size for file in artifact.weight_files)
    record: dict[str, Any] = {
        "path": subject.name,
        "kind": artifact.kind if subject.prefix is None else "context",
        "load_path": subject.plan.load_path,
        "reference": subject.reference,
        "loss": figures.loss.value,
        "loss_stderr": _number(figures.loss.stderr),
        "loss_interval95": _interval(figures.loss.lower, figures.loss.upper),
        "perplexity": _number(figures.perplexity),
        "perplexity_stderr": _number(figures.perplexity_stderr),
        "bits_per_byte": figures.bits_per_byte.value,
        "bits_per_byte_stderr": _number(figures.bits_per_byte.stderr),
        "word_perplexity": _number(figures.word_perplexity),
        "byte_perplexity": _number(figures.byte_perplexity),
        "tokens": protocol.tokens,
        "documents": protocol.documents,
        "delta_loss": None,
        "delta_loss_stderr": None,
        "delta_loss_interval95": None,
        "delta_perplexity": None,
        "delta_perplexity_relative": None,
        "delta_bits_per_byte": None,
        "tokens_per_second": cost.timed_tokens / cost.seconds if cost.seconds and cost.timed_tokens else None,
        "load_seconds": cost.load_seconds,
        "peak_memory_bytes": cost.peak_bytes,
        "weight_bytes": stored,
        "parameters": cost.parameters,
        "bits_per_parameter": 8 * stored / cost.parameters,
        "device": cost.device,
        "dtype": subject.plan.dtype,
        "batch_size": cost.batch_size,
        "kept_linears": cost.kept_linears,
        "packed_linears": cost.packed_linears,
        "cached": cost.cached,
    }
    if delta is not None:
        record |= {
            "delta_loss": delta.loss.value,
            "delta_loss_stderr": _number(delta.loss.stderr),
            "delta_loss_interval95": _interval(delta.loss.lower, delta.loss.upper),
            "delta_perplexity": _number(delta.perplexity),
            "delta_perplexity_relative": _number(delta.relative_perplexity),
            "delta_bits_per_byte": delta.bits_per_byte,
        }
    return record


def _interval(lower: float, upper: float) -> list[float | None]:
    return [_number(lower), _number(upper)]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None

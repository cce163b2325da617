"""A model's entry in the JSON result. Names are frozen once released; what was not measured is null."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadstone.evaluation.models import EvalModel
from loadstone.evaluation.results.compare import Delta
from loadstone.evaluation.results.metrics import DELTA, LOSS, Estimate, to_record
from loadstone.text.tokens import Protocol


@dataclass(frozen=True)
class Cost:
    """Time and memory that scoring a model took. ``dequantized_linears``, ``repacked_linears``: see `FastPath`.
    ``cached``: the scores came from the cache, and these figures are those of the run that computed them."""

    seconds: float
    timed_tokens: int
    load_seconds: float
    peak_bytes: int
    device: str
    batch_size: int
    parameters: int
    dequantized_linears: int = 0
    repacked_linears: int = 0
    cached: bool = False


def make_record(
    model: EvalModel, protocol: Protocol, cost: Cost, losses: dict[str, Estimate], delta: Delta | None
) -> dict[str, Any]:
    """The record of one model. ``losses``: its metrics of group LOSS; ``delta``: its difference to the reference, None
    for the reference itself."""
    artifact = model.plan.artifact
    stored = sum((artifact.path / file).stat().st_size for file in artifact.weight_files)
    return {
        "path": model.name,
        "kind": artifact.kind if model.prefix is None else "context",
        "load_path": model.plan.load_path,
        "reference": model.reference,
        **to_record(LOSS, losses),
        "tokens": protocol.tokens,
        "documents": protocol.documents,
        **to_record(DELTA, None if delta is None else delta.estimates),
        "tokens_per_second": cost.timed_tokens / cost.seconds if cost.seconds and cost.timed_tokens else None,
        "load_seconds": cost.load_seconds,
        "peak_memory_bytes": cost.peak_bytes,
        "weight_bytes": stored,
        "parameters": cost.parameters,
        "bits_per_parameter": 8 * stored / cost.parameters,
        "device": cost.device,
        "dtype": model.plan.dtype,
        "inputs": model.inputs or None,
        "batch_size": cost.batch_size,
        "ranks_per_copy": 1 if model.mesh is None else model.mesh.size(),
        "dequantized_linears": cost.dequantized_linears,
        "repacked_linears": cost.repacked_linears,
        "cached": cost.cached,
    }

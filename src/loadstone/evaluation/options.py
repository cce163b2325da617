"""The options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from loadstone.evaluation.results.gates import DIVERGENCE, Gate

DEFAULT_CACHE = "~/.cache/loadstone/eval"


@dataclass(frozen=True)
class Options:
    """What to evaluate and how; the fields are the command's options (docs/eval.md)."""

    models: tuple[str, ...]
    base: str | None = None
    baseline: str | None = None
    data: str = "sample"
    text_column: str | None = None
    split: str | None = None
    limit: int | None = None
    protocol: str = "packed"
    context_length: int | None = None
    stride: int | None = None
    separator: str = "auto"
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    checkpoint: str | None = None
    no_checkpoint: bool = False
    trust_remote_code: bool = False
    divergence: bool = False
    worst: int = 5
    fast: bool = True
    compile: bool = False
    stream: bool | None = None
    cache: str | None = None
    resume: bool = False
    save_every: float = 30.0
    tasks: tuple[str, ...] = ()
    task_path: str | None = None
    speed: bool = False
    gates: tuple[Gate, ...] = ()

    @property
    def compares(self) -> bool:
        """Whether there is a reference to compare with."""
        return self.baseline is not None or len(set(self.models)) > 1

    @property
    def measures_divergence(self) -> bool:
        return self.divergence or any(gate.metric in DIVERGENCE for gate in self.gates)

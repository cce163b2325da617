"""The result of `loadstone.evaluate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from loadstone.evaluation.results.gates import Verdict

if TYPE_CHECKING:
    import numpy as np

    from loadstone.evaluation.task import Task


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation measured.

    ``records``: one dict for each model, the reference first, with the keys of docs/eval.md (fitted tables: of
    docs/contexts.md). ``verdicts``: of each gate for each model. ``protocol``: what was asked of the models.
    ``description``, ``note``: the protocol, and how errors were estimated, in a line. ``first``: whether this process
    is the one that reports, as opposed to a further rank of a ``torchrun`` job. For text, ``task`` holds the tokens and
    windows, and ``values`` each model's per-token values by path: ``nll``, float32 (tokens,), and with a divergence
    ``nll_reference``, ``kl``, ``kl_reverse`` and ``top1``."""

    protocol: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    verdicts: tuple[Verdict, ...]
    description: str
    note: str = ""
    first: bool = True
    task: Task | None = None
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Verdict, ...]:
        """The gates that failed."""
        return tuple(v for v in self.verdicts if v.failed)

    def as_json(self) -> dict[str, Any]:
        """The result as plain dicts, lists, strings and numbers, in the documented schema."""
        return {
            "protocol": self.protocol,
            "models": list(self.records),
            "gates": [asdict(v) for v in self.verdicts],
        }

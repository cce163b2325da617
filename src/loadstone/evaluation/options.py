"""The options of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from loadstone.errors import UsageError
from loadstone.evaluation.results.gates import Gate

# The options that apply to a fitted table; the others are about language models.
TABLE_OPTIONS = frozenset({"models", "data", "base", "device", "gates"})
# The command's name of an option where it is not the field's.
_FLAGS = {"divergence": "--kl", "fast": "--no-fast", "text_column": "--text-column"}
DEFAULT_DATA = "sample"
DEFAULT_CACHE = "~/.cache/loadstone/eval"


@dataclass(frozen=True)
class Options:
    """What to evaluate and how; the fields are the arguments of `loadstone.evaluate` (docs/eval.md)."""

    models: tuple[str, ...]
    base: str | None = None
    baseline: str | None = None
    data: str = DEFAULT_DATA
    text_column: str | None = None
    split: str | None = None
    limit: int | None = None
    chat: bool = False
    protocol: str | None = None
    context_length: int | None = None
    stride: int | None = None
    separator: str = "auto"
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    checkpoint: str | None = None
    no_checkpoint: bool = False
    trust_remote_code: bool = False
    native_kernels: bool = False
    divergence: bool = False
    worst: int = 5
    fast: bool = True
    compile: bool | None = None
    stream: bool | None = None
    activations: bool = False
    parallel: str | None = None
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
        """Whether each model is scored beside the reference: for ``--kl``, or for a gate on the divergence."""
        return self.divergence or any(gate.needs_divergence for gate in self.gates)

    def refuse_for_tables(self) -> None:
        """Raise UsageError for an option that does not apply to fitted tables: it is refused, not ignored."""
        changed = [f.name for f in fields(self) if f.name != "models" and getattr(self, f.name) != f.default]
        refuse_for_tables(changed)


def refuse_for_tables(names: Sequence[str]) -> None:
    """Raise UsageError when one of these options does not apply to fitted tables."""
    for name in names:
        if name not in TABLE_OPTIONS:
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            raise UsageError(
                f"{flag} is about language models; a fitted context is evaluated on a table", "Leave it out"
            )

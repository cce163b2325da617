"""Sizes of a PFN, and the tasks it has a head for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from loadstone.context.tables.predictions import CLASSIFICATION, REGRESSION
from loadstone.errors import ArtifactError, UsageError

MODEL_TYPE = "loadstone-pfn"


@dataclass(frozen=True)
class PFNConfig:
    """Sizes of a PFN; ``config.json`` beside its weights. ``bars`` or ``classes`` of 0 leave that task out."""

    width: int = 128
    layers: int = 6
    heads: int = 4
    hidden: int = 256
    bars: int = 100
    classes: int = 10
    max_features: int = 100
    per_feature: bool = True
    code_size: int = 32
    model_type: str = MODEL_TYPE

    def __post_init__(self) -> None:
        sizes = (self.width, self.layers, self.heads, self.hidden, self.max_features, self.code_size)
        if not all(type(n) is int and 0 < n <= 65_536 for n in sizes) or self.width % self.heads:
            raise ArtifactError(
                f"config.json: impossible sizes {sizes} (width must divide by heads)", "Restore the file"
            )
        if not all(type(n) is int and 0 <= n <= 65_536 for n in (self.bars, self.classes)) or self.bars in (
            1,
            2,
        ):
            raise ArtifactError(
                f"config.json: impossible head sizes {(self.bars, self.classes)}", "Restore the file"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> PFNConfig:
        """The config in a ``config.json``; raises `ArtifactError` for sizes that make no model."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return asdict(self) | {"architectures": ["PFN"]}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks the model has a head for."""
        return (REGRESSION,) * (self.bars > 0) + (CLASSIFICATION,) * (self.classes > 0)

    def tokens(self, features: int) -> int:
        """Tokens of one row with this many features."""
        return features + 1 if self.per_feature else 1


def check_task(config: PFNConfig, task: str) -> str:
    """``task`` if the model has a head for it; raises `UsageError` otherwise."""
    if task not in config.tasks:
        raise UsageError(f"the model has no {task!r} head", f"It can do {' and '.join(config.tasks)}")
    return task

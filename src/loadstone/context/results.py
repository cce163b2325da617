"""What `loadstone.fit` returns: the plan of a dry run, or what was written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TableFit:
    """What `fit` did with a table, or would do.

    ``cache_dtype`` None stands for the default of a TabPFN checkpoint. ``cache_bytes``: keys and values;
    ``predicted_bytes``: all tensors of the context, None where the checkpoint's architecture has no estimate;
    ``architecture`` and ``members`` (of the ensemble) are a TabPFN's. ``bytes`` (in memory), ``file_bytes`` and
    ``seconds`` are None after a dry run.
    """

    dry_run: bool
    out: str | None
    base: str
    table: str
    target: str
    task: str
    rows: int
    features: int
    categorical: list[str]
    classes: list[str]
    cache_dtype: str | None
    cache_bytes: int | None
    predicted_bytes: int | None
    architecture: str | None = None
    members: int | None = None
    bytes: int | None = None
    file_bytes: int | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class PromptFit:
    """What `fit` did with a prompt, or would do.

    ``recipe``: how the model's weights are quantized (``none`` for plain weights). ``template``: whether the prompt was
    rendered by the chat template. ``dtype``: what the model computes in. ``predicted_bytes``: keys and values, None
    where config.json does not say. ``bytes`` (in memory), ``file_bytes`` and ``seconds`` are None after a dry run.
    """

    dry_run: bool
    out: str | None
    base: str
    prompt: str
    recipe: str
    tokens: int
    template: bool
    dtype: str
    cache_dtype: str
    predicted_bytes: int | None
    bytes: int | None = None
    file_bytes: int | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return asdict(self)

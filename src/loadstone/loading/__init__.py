"""From an artifact to a model: the load plan (pure data) and the loaders that act on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadstone.loading.plan import LoadPlan, plan

if TYPE_CHECKING:
    from loadstone.loading.loader import load as load
    from loadstone.loading.loader import load_tokenizer as load_tokenizer

__all__ = ["LoadPlan", "load", "load_tokenizer", "plan"]


def __getattr__(name: str) -> Any:
    # `inspect` plans without loading: the loader is imported on first use.
    if name in ("load", "load_tokenizer"):
        from loadstone.loading import loader

        return getattr(loader, name)
    raise AttributeError(f"module 'loadstone.loading' has no attribute {name!r}")

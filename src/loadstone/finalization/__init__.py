"""From a checkpoint to an artifact: plan, stream, quantize, write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadstone.finalization.plan import FinalizePlan, make_plan

if TYPE_CHECKING:
    from loadstone.finalization.run import Finalized as Finalized
    from loadstone.finalization.run import finalize as finalize

__all__ = ["FinalizePlan", "Finalized", "finalize", "make_plan"]


def __getattr__(name: str) -> Any:
    # A dry run plans and writes nothing: what writes is imported on first use.
    if name in ("Finalized", "finalize"):
        from loadstone.finalization import run

        return getattr(run, name)
    raise AttributeError(f"module 'loadstone.finalization' has no attribute {name!r}")

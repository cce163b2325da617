"""loadstone: turn a trained model into an artifact that anyone can load, trust and measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadstone.artifact import detect as detect
    from loadstone.context import fit as fit
    from loadstone.context import load_context as load_context
    from loadstone.context import predict as predict
    from loadstone.evaluation import evaluate as evaluate
    from loadstone.fakequant import export_fakequant as export_fakequant
    from loadstone.finalization import finalize as finalize
    from loadstone.finalization import plan_finalize as plan_finalize
    from loadstone.loading import load as load
    from loadstone.loading import plan as plan

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "detect",
    "evaluate",
    "export_fakequant",
    "finalize",
    "fit",
    "load",
    "load_context",
    "plan",
    "plan_finalize",
    "predict",
]

_HOMES = {
    "detect": "loadstone.artifact",
    "evaluate": "loadstone.evaluation",
    "export_fakequant": "loadstone.fakequant",
    "finalize": "loadstone.finalization",
    "fit": "loadstone.context",
    "load": "loadstone.loading",
    "load_context": "loadstone.context",
    "plan": "loadstone.loading",
    "plan_finalize": "loadstone.finalization",
    "predict": "loadstone.context",
}


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `import loadstone` (and with it the command line) stays instant.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loadstone' has no attribute {name!r}")

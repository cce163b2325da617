"""Fitted contexts: the frozen keys, values and encoder state of a prefix, in memory and on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadstone.context.api import fit as fit
    from loadstone.context.api import predict as predict
    from loadstone.context.bayesopt.optimize import optimize_acquisition as optimize_acquisition
    from loadstone.context.opening import load as load
    from loadstone.context.opening import load_context as load_context
    from loadstone.context.pfn.bars import BarPosterior as BarPosterior
    from loadstone.context.pfn.config import PFNConfig as PFNConfig
    from loadstone.context.pfn.model import PFN as PFN
    from loadstone.context.pfn.prefill import fit_context as fit_context
    from loadstone.context.pfn.training_context import TrainingContext as TrainingContext

_HOMES = {
    "PFN": "pfn.model",
    "PFNConfig": "pfn.config",
    "BarPosterior": "pfn.bars",
    "TrainingContext": "pfn.training_context",
    "fit": "api",
    "fit_context": "pfn.prefill",
    "load": "opening",
    "load_context": "opening",
    "optimize_acquisition": "bayesopt.optimize",
    "predict": "api",
}
__all__ = [
    "PFN",
    "BarPosterior",
    "PFNConfig",
    "TrainingContext",
    "fit",
    "fit_context",
    "load",
    "load_context",
    "optimize_acquisition",
    "predict",
]


def __getattr__(name: str) -> Any:
    # torch is imported with the first name that needs it.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"loadstone.context.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'loadstone.context' has no attribute {name!r}")

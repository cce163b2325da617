"""PFNs: the model, the KV cache of its training rows, and that cache on disk."""

from loadstone.context.pfn.bars import BarPosterior
from loadstone.context.pfn.bases import load_base
from loadstone.context.pfn.config import PFNConfig
from loadstone.context.pfn.model import PFN
from loadstone.context.pfn.prefill import fit_context
from loadstone.context.pfn.store import load_table_context
from loadstone.context.pfn.training_context import TrainingContext

__all__ = [
    "PFN",
    "BarPosterior",
    "PFNConfig",
    "TrainingContext",
    "fit_context",
    "load_base",
    "load_table_context",
]

"""From a checkpoint to an artifact: plan, stream, quantize, write."""

from loadstone.finalize.plan import FinalizePlan, make_plan
from loadstone.finalize.run import Finalized, finalize

__all__ = ["FinalizePlan", "Finalized", "finalize", "make_plan"]

"""From a checkpoint to an artifact: plan, read, encode, write."""

from loadstone.finalization.api import finalize, plan_finalize
from loadstone.finalization.plan import FinalizePlan, Step
from loadstone.finalization.run import Finalized

__all__ = ["FinalizePlan", "Finalized", "Step", "finalize", "plan_finalize"]

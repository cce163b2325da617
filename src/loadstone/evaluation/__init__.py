"""Measure models: text and tokens, scoring, statistics, comparison, gates."""

from loadstone.evaluation.api import evaluate
from loadstone.evaluation.result import Evaluation

__all__ = ["Evaluation", "evaluate"]

"""Bayesian optimisation on a fitted PFN context."""

from loadstone.context.bayesopt.acquisition import ei, log_ei, pi, quantile, thompson, ucb
from loadstone.context.bayesopt.optimize import Optimum, optimize_acquisition

__all__ = ["Optimum", "ei", "log_ei", "optimize_acquisition", "pi", "quantile", "thompson", "ucb"]

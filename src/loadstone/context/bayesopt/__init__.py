"""Bayesian optimisation on a fitted PFN context."""

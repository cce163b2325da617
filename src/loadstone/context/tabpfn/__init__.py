"""Fitted TabPFN estimators, stored without weights."""

from loadstone.context.tabpfn.estimator import check_probe, load, save

__all__ = ["check_probe", "load", "save"]

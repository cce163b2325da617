"""Fitted TabPFN estimators, stored without weights."""

"""The version: read by pyproject.toml and by everything that records it."""

__version__ = "0.1.0"

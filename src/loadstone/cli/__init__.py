"""The command line: one file a command. Nothing here imports torch, transformers or datasets."""

from loadstone.cli.app import main

__all__ = ["main"]

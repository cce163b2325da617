"""Every error that loadstone raises on purpose, each with the exit code the command line ends with."""

from __future__ import annotations


class LoadstoneError(Exception):
    """A failure with a remedy: ``message`` says what is wrong and where, ``remedy`` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


class UsageError(LoadstoneError):
    """The command or call itself is wrong: an unknown recipe, an existing output, a bad option value."""

    exit_code = 2


class ArtifactError(LoadstoneError):
    """The artifact is invalid, damaged, or cannot be loaded here."""

    exit_code = 3


class GateFailed(LoadstoneError):
    """A measured figure crossed the limit that ``--fail-if`` names."""

    exit_code = 4


class MissingError(LoadstoneError):
    """Something the work needs is not here: a package, a GPU, disk space."""

    exit_code = 5

"""Models that come with the package, under names of the form ``builtin:tiny-pfn``."""

from __future__ import annotations

from pathlib import Path

from loadstone.errors import UsageError

PREFIX = "builtin:"
_ROOT = Path(__file__).resolve().parent.parent / "builtin"


def builtin_path(name: str) -> Path:
    """The directory of a built-in model; raises `UsageError`, listing what there is, for an unknown name."""
    wanted = name.removeprefix(PREFIX)
    if wanted not in builtin_names():
        raise UsageError(f"there is no built-in model '{name}'", f"There is {', '.join(builtin_names())}")
    return _ROOT / wanted


def shown(path: Path) -> str:
    """A model's path as users write it: ``builtin:NAME`` for a built-in model."""
    return f"{PREFIX}{path.name}" if path.parent == _ROOT else str(path)


def builtin_names() -> list[str]:
    """Names of all built-in models, without the prefix."""
    return sorted(path.parent.name for path in _ROOT.glob("*/config.json"))

"""Facts that torch, transformers and torchao were asked for, kept on disk: the next process need not import them.

Importing the three takes seconds, and what a plan asks of them depends on their versions and on the question alone. An
answer is a JSON file in the user's cache directory (``$XDG_CACHE_HOME`` or ``~/.cache``, under ``loadstone/facts``),
named by a hash of both. The directory may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "torchao", "transformers", "accelerate", "loadstone")
_KEPT_DAYS = 30
_MOST_BYTES = 64_000_000


class Memo:
    """Answers by question, kept in ``directory``; None asks anew each time and keeps nothing.

    ``prepare`` is called once, before the first question that has to be asked.
    """

    def __init__(self, directory: Path | None = None, prepare: Callable[[], None] = lambda: None) -> None:
        self._directory = directory
        self._prepare = prepare
        self._prepared = False
        self._environment: list[Any] | None = None

    def ask(self, what: str, key: Any, make: Callable[[], Any]) -> Any:
        """The answer to question ``what`` about ``key``, both JSON: an earlier one, else what ``make`` returns."""
        path = self._path(what, key)
        if path is not None and (found := _read(path, what)) is not None:
            return found[0]
        if not self._prepared:
            self._prepare()
            self._prepared = True
        answer = make()
        if path is not None:
            _write(path, what, answer)
        return answer

    def unkept(self) -> Memo:
        """The same for questions whose answers may change: each is asked anew."""
        return Memo(None, self._prepare)

    def _path(self, what: str, key: Any) -> Path | None:
        if self._directory is None:
            return None
        if self._environment is None:
            self._environment = environment()
        if not self._environment:
            return None
        text = json.dumps([what, key, self._environment], sort_keys=True)
        return self._directory / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def user_directory() -> Path | None:
    """Where a user's answers are kept; None where no home directory is known."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "loadstone" / "facts"
    except RuntimeError:
        return None


def environment() -> list[Any]:
    """Python, and version, place and age of each library that answers; empty when one may change unnoticed."""
    from importlib.metadata import PackageNotFoundError, distribution

    found: list[Any] = [sys.version]
    for name in _LIBRARIES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            found.append([name, None])
            continue
        try:
            about = distribution(name)
        except PackageNotFoundError:
            about = None
        folder = Path(spec.origin).parent
        if name == "loadstone":
            sources = sorted(folder.rglob("*.py"))
            found.append([name, [[str(p.relative_to(folder)), p.stat().st_mtime_ns] for p in sources]])
            continue
        if about is None or '"editable": true' in (about.read_text("direct_url.json") or ""):
            return []
        found.append([name, about.version, str(folder), (folder / "__init__.py").stat().st_mtime_ns])
    return found


def _read(path: Path, what: str) -> list[Any] | None:
    """The stored answer in a list, None when there is none that can be read."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        content = json.loads(path.read_bytes())
        return [content["answer"]] if content["question"] == what else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, what: str, answer: Any) -> None:
    """Keep an answer; a directory that cannot be written is no error."""
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in path.parent.iterdir():
            if time.time() - old.stat().st_mtime > _KEPT_DAYS * 86400:
                old.unlink(missing_ok=True)
        partial.write_text(json.dumps({"question": what, "answer": answer}, separators=(",", ":")))
        partial.replace(path)
    except OSError as error:
        log.debug("facts are not kept in %s: %s", path.parent, error.strerror)

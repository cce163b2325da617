"""Read YAML files node by node, so that every error names the file and the line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from loadstone.artifact.files import read_text
from loadstone.artifact.patterns import unsound
from loadstone.errors import UsageError

# A file of rules is a page or two long: a larger file is something else.
_MAX_BYTES = 250_000


def read_yaml(path: Path, what: str, see: str) -> Any:
    """The root node of a YAML file, None when it is empty.

    ``what``: kind of file, for messages (``recipe file``); ``see``: where its form is described. Raises `UsageError`.
    """
    import yaml

    if not path.exists():
        raise UsageError(f"there is no {what} '{path}'", see)
    try:
        return yaml.compose(read_text(path, _MAX_BYTES, UsageError), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UsageError(f"{path}{line}: {problem}", see) from None


def mapping(path: Path, node: Any, known: tuple[str, ...], what: str) -> dict[str, Any]:
    """The nodes of a mapping by key. Raises `UsageError` for another kind of node and for unknown or repeated keys."""
    if node.id != "mapping":
        raise UsageError(
            f"{place(path, node)}: {what} is a mapping, this is a {node.id}", f"Keys: {', '.join(known)}"
        )
    values: dict[str, Any] = {}
    for key, value in node.value:
        if key.value not in known:
            close = difflib.get_close_matches(str(key.value), known, n=1, cutoff=0.4)
            hint = f"Did you mean '{close[0]}'? " if close else ""
            raise UsageError(
                f"{place(path, key)}: unknown key '{key.value}'", f"{hint}Keys: {', '.join(known)}"
            )
        if key.value in values:
            raise UsageError(f"{place(path, key)}: '{key.value}' is duplicated", "Keep one")
        values[key.value] = value
    return values


def rules_in(path: Path, node: Any, keys: tuple[str, str]) -> list[tuple[Any, Any, Any]]:
    """(the rule, and the nodes of its two ``keys``) for each entry of ``rules``; none when there is no such list."""
    if node is None:
        return []
    if node.id != "sequence":
        raise UsageError(
            f"{place(path, node)}: rules is a list, this is a {node.id}", "Begin each rule with '- '"
        )
    found = []
    for entry in node.value:
        values = mapping(path, entry, keys, "a rule")
        for key in keys:
            if key not in values:
                raise UsageError(
                    f"{place(path, entry)}: the rule has no {key}",
                    f"A rule is {{{keys[0]}: …, {keys[1]}: …}}",
                )
        found.append((entry, values[keys[0]], values[keys[1]]))
    return found


def pattern(path: Path, node: Any, what: str) -> str:
    """A pattern for module names; raises `UsageError` when it is not text or not a regular expression."""
    found = text(path, node, what, "a pattern: mlp, *.down_proj or re:REGEX")
    check_pattern(found, place(path, node))
    return found


def check_pattern(pattern: str, where: str) -> None:
    """Raise `UsageError` for a ``re:`` pattern that is not a regular expression, or could take for ever."""
    if pattern.startswith("re:") and (why := unsound(pattern[3:])):
        raise UsageError(
            f"{where}: '{pattern[:200]}' {why}",
            "Python's re syntax, with at most four repeats such as .* and in these no repeats or choices",
        )


def text(path: Path, node: Any, what: str, wanted: str) -> str:
    """A scalar's text. Raises `UsageError` for a number, an empty text or another kind of node."""
    if node.id != "scalar" or node.tag != "tag:yaml.org,2002:str" or not node.value.strip():
        found = f"'{node.value}'" if node.id == "scalar" and node.value else f"a {node.id}"
        raise UsageError(f"{place(path, node)}: {what} is text, this is {found}", f"Write {wanted}")
    return str(node.value.strip())


def place(path: Path, node: Any) -> str:
    """``file:line`` of a node."""
    return f"{path}:{node.start_mark.line + 1}"

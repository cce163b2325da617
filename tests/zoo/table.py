"""docs/support.md: model types against commands, and the list of faults."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

# Every other status is a fault.
FAULTLESS = ("right", "refused", "none")
_NOT_TRIED = ("none", "not tried")

HEAD = """# Which models work with which command

`make zoo` makes one tiny random model of every model type that transformers registers, tries each command on it and
writes this page. *right*: the command ran, transformers alone and `loadstone.load` both load the artifact, the two
models agree in every tensor, output and attribute, and every value is the original's up to the format's rounding
(bit for bit where nothing is quantized). A letter: the command refused before it wrote anything, for the reason below.
Sizes, dtypes and inputs are those of `tests/zoo/`; a model type says nothing about a particular checkpoint.

"""


def summary(results: dict[str, Any]) -> str:
    """Counts by column and status."""
    tried = sum("results" in entry for entry in results.values())
    lines = [f"{len(results)} model types, {tried} tried"]
    columns: dict[str, Counter[str]] = {}
    for entry in results.values():
        for name, (status, *_) in entry.get("results", {}).items():
            columns.setdefault(name, Counter())[status] += 1
    return "\n".join(lines + [f"{name}: {_counts(counts)}" for name, counts in columns.items()])


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {status}" for status, number in counts.most_common())


def faults(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, set[str]]]:
    """Types and columns by kind of fault: (status, the detail without the names of one model)."""
    found: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for model_type, entry in results.items():
        if "failed" in entry:
            found["the zoo's own", general(entry["failed"])][model_type].add("make")
        for column, (status, detail, *_) in entry.get("results", {}).items():
            if status not in FAULTLESS:
                found[status, general(detail)][model_type].add(column)
    return found


def general(text: str) -> str:
    """A message without what differs from model to model: classes, tensor names, numbers, paths."""
    text = re.sub(r"[0-9a-f]{12,}", "#", text)
    text = re.sub(r"\b[\w-]+(?:\.[\w-]+){2,}\b", "NAME", text)
    text = re.sub(
        r"\b(?!\w*(?:Error|Tensor)\b)(?:(?:[A-Z]+[a-z0-9_]+){2,}[A-Z]*|[A-Z][a-z]+\d*[A-Z]{2,})\b",
        "CLASS",
        text,
    )
    return re.sub(r"\d+(?:\.\d+)?(?:e-?\d+)?", "N", text)[:150]


def faults_text(results: dict[str, Any]) -> str:
    """The faults, the most frequent kind first, with an example in full."""
    lines = [summary(results), ""]
    for (status, kind), types in sorted(faults(results).items(), key=lambda item: -len(item[1])):
        example = min(types)
        entry = results[example]
        outcomes = [
            r[1] for r in entry.get("results", {}).values() if (r[0], general(r[1])) == (status, kind)
        ]
        details = outcomes or [entry.get("failed", "")]
        columns = sorted(set().union(*types.values()))
        lines += [
            f"## {status}: {len(types)} types ({', '.join(columns)})",
            f"Kind: {kind}",
            f"Example, {example}: {details[0][:900]}",
            f"Types: {', '.join(sorted(types))}",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """``python -m tests.zoo.table results.json…``: the faults by kind."""
    results: dict[str, Any] = {}
    for path in sys.argv[1:]:
        results |= json.loads(Path(path).read_text())
    print(faults_text(results))


def write_table(results: dict[str, Any], path: Path) -> None:
    """The page of docs: counts, one row for each type, the reasons, and the types without a model."""
    tried = {name: entry for name, entry in results.items() if "results" in entry}
    columns = list(dict.fromkeys(c for entry in tried.values() for c in entry["results"]))
    reasons: dict[str, str] = {}
    rows = []
    for name, entry in tried.items():
        cells = [_cell(entry["results"].get(column, _NOT_TRIED), reasons) for column in columns]
        rows.append(f"| {name} | {entry['class'].split(':')[-1]} | {' | '.join(cells)} |")
    counts = [
        f"| {column} | {_counts(Counter(e['results'].get(column, _NOT_TRIED)[0] for e in tried.values()))} |"
        for column in columns
    ]
    others: dict[str, list[str]] = defaultdict(list)
    for name, entry in results.items():
        if "results" not in entry:
            others[entry.get("none") or entry["failed"]].append(name)
    text = [
        HEAD + f"{len(results)} model types, {len(tried)} tried.\n",
        "| command | types |\n|---|---|",
        *counts,
        "\n## By model type\n",
        f"| type | class | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}",
        *rows,
        "\n## Reasons\n",
        *(f"- **{letter}**: {reason}" for reason, letter in reasons.items()),
        "\n## Not tried\n",
        *(f"- {reason}: {', '.join(sorted(names))}" for reason, names in sorted(others.items())),
    ]
    path.write_text("\n".join(text) + "\n")


def _cell(result: list[Any], reasons: dict[str, str]) -> str:
    status, detail, *_ = result
    if status == "refused":
        return reasons.setdefault(general(detail), _letter(len(reasons)))
    return status if status in FAULTLESS else f"**{status}**"


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else _letter(number // 26 - 1) + _letter(number % 26)


if __name__ == "__main__":
    main()

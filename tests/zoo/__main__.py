"""Try every model type: ``python -m tests.zoo [--types a,b] [--part N/M] [--jobs 2] [--columns c,d] -o out.json``.

The results are written after each type; ``--resume`` tries only what the file does not hold yet.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tests.zoo.checks import CHECKS, Case, Result
from tests.zoo.process import Process
from tests.zoo.table import FAULTLESS, summary, write_table


def try_type(
    model_type: str, commands: list[str], folder: Path, stock: Process, loadstone: Process
) -> dict[str, Any]:
    """Make the model of one type and run the checks on it. Each result is [status, detail, seconds]."""
    path = folder / model_type
    path.mkdir(parents=True)
    try:
        answer = stock.ask("build", model_type=model_type, path=str(path))
        if "ok" not in answer:
            return {"failed": f"the zoo cannot make it: {reason(answer)}"}
        facts = answer["ok"]
        if "no_model" in facts:
            return {"none": facts["no_model"]}
        case = Case(model_type, path, facts, stock, loadstone, {})
        answer = case.observe(stock, case.model, keep=True)
        if "ok" not in answer:
            why = reason(answer).replace(str(path), "")
            return {"none": f"transformers cannot reload what it saved: {why}"}
        case.original = answer["ok"]
        return facts | {
            "info": case.original["info"],
            "results": {name: _timed(name, case) for name in commands},
        }
    finally:
        shutil.rmtree(path, ignore_errors=True)
        stock.rest()
        loadstone.rest()


def reason(answer: dict[str, Any]) -> str:
    return f"{answer.get('error') or answer['crash']} {answer.get('where', '')}".strip()


def _timed(name: str, case: Case) -> list[Any]:
    start = time.monotonic()
    try:
        result = CHECKS[name](case)
    except Exception as error:
        result = Result("zoo error", f"{type(error).__name__}: {error}")
    return [result.status, result.detail, round(time.monotonic() - start, 2)]


class Results:
    """The entries of all types, in a file too where there is one: written after each type."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lock = threading.Lock()
        # What the other parts of the zoo and earlier runs found.
        self.entries: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def lacks(self, model_type: str, commands: list[str]) -> bool:
        entry = self.entries.get(model_type, {"results": {}})
        return "results" in entry and not set(commands) <= entry["results"].keys()

    def add(self, model_type: str, entry: dict[str, Any]) -> None:
        """Add an entry; columns that it lacks stay as they were."""
        with self.lock:
            before = self.entries.get(model_type, {}).get("results", {})
            if "results" in entry:
                found = before | entry["results"]
                entry = entry | {"results": {name: found[name] for name in CHECKS if name in found}}
            self.entries = dict(sorted((self.entries | {model_type: entry}).items()))
            if self.path is not None:
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text(json.dumps(self.entries, indent=1))
                temporary.replace(self.path)


def work(types: Queue[str], commands: list[str], folder: Path, results: Results) -> None:
    stock, loadstone = Process("stock"), Process("loadstone")
    try:
        while True:
            model_type = types.get_nowait()
            start = time.monotonic()
            entry = try_type(model_type, commands, folder, stock, loadstone)
            entry["seconds"] = round(time.monotonic() - start, 1)
            print(_line(model_type, entry), flush=True)
            results.add(model_type, entry)
    except Empty:
        pass
    finally:
        stock.close()
        loadstone.close()


def _line(model_type: str, entry: dict[str, Any]) -> str:
    faults = [
        f"{k}: {r[0]} ({r[1][:150]})" for k, r in entry.get("results", {}).items() if r[0] not in FAULTLESS
    ]
    text = entry.get("failed") or entry.get("none") or "; ".join(faults) or "ok"
    return f"{model_type} {entry['seconds']} s {text[:400]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--types", help="model types, separated by commas (default: all)")
    parser.add_argument("--part", default="1/1", help="N/M: every M-th type, from the N-th")
    parser.add_argument("--jobs", type=int, default=2, help="models tried at a time")
    parser.add_argument("--columns", help=f"columns or their first words: {', '.join(CHECKS)}")
    parser.add_argument("-o", "--out", type=Path, help="JSON file of the results")
    parser.add_argument("--resume", action="store_true", help="only types and columns that --out lacks")
    parser.add_argument("--table", type=Path, help="Markdown table to write")
    options = parser.parse_args()

    from tests.zoo.classes import model_types

    number, parts = map(int, options.part.split("/"))
    chosen = options.types.split(",") if options.types else model_types()[number - 1 :: parts]
    words = options.columns.split(",") if options.columns else list(CHECKS)
    commands = [column for column in CHECKS if any(f"{column} ".startswith(f"{word} ") for word in words)]
    found = Results(options.out)
    types: Queue[str] = Queue()
    for model_type in chosen:
        if not options.resume or found.lacks(model_type, commands):
            types.put(model_type)
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        threads = [
            threading.Thread(target=work, args=(types, commands, Path(folder), found))
            for _ in range(options.jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    results = found.entries
    if options.table:
        write_table(results, options.table)
    print(summary(results))
    faults = any(
        r[0] not in FAULTLESS for entry in results.values() for r in entry.get("results", {}).values()
    )
    return int(faults or any("failed" in entry for entry in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())

"""Every two modes of an evaluation that a user can combine, each row of the table holding many pairs at once."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.helpers import on_ranks

import loadstone
from loadstone.quantization import RECIPES

# Every recipe that a CPU computes, and every mode.
MODES: dict[str, list[Any]] = {
    "recipe": ["", *(name for name, recipe in RECIPES.items() if "cpu" in recipe.devices)],
    "dtype": ["auto", "bfloat16", "float16"],
    "compile": [False, True],
    "fast": [True, False],
    "kl": [False, True],
    "stream": [None, True],
    "tasks": [False, True],
}
# Without recipes whose tensors are of the same class as another's.
SHORT = MODES | {
    "recipe": [
        x for x in MODES["recipe"] if "intx-" not in x and not x.startswith(("intx3", "intx2", "mxfp8"))
    ],
    "dtype": ["auto", "bfloat16"],
}
# How far compiled layers may move a loss, and everything else: they keep more in float32.
COMPILED = {"auto": 2e-3, "bfloat16": 3e-2, "float16": 3e-3}
PLAIN = {"auto": 1e-5, "bfloat16": 2e-3, "float16": 2e-4}


def pairwise(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Few rows in which every two values of different factors meet: always the row with the most that are left."""
    everything = {
        row: frozenset(itertools.combinations(zip(factors, row, strict=True), 2))
        for row in itertools.product(*(range(len(values)) for values in factors.values()))
    }
    left = set().union(*everything.values())
    rows = []
    while left:
        best = max(everything, key=lambda row: len(everything[row] & left))
        left -= everything[best]
        rows.append({name: factors[name][at] for name, at in zip(factors, best, strict=True)})
    return rows


def label(row: dict[str, Any]) -> str:
    given = [f"{k}={v}" for k, v in row.items() if v is not None and v is not False and v not in ("", "auto")]
    return " ".join(given).replace("=True", "")


def test_the_rows_hold_every_pair() -> None:
    rows = pairwise(SHORT)
    for a, b in itertools.combinations(SHORT, 2):
        assert {(r[a], r[b]) for r in rows} == set(itertools.product(SHORT[a], SHORT[b]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents, and a folder with a task over them."""
    directory = tmp_path_factory.mktemp("pairs")
    texts = ["A loadstone shows the way. " * 12, "Iron follows it, and nobody knows why. " * 4]
    (directory / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    task = {
        "task": "pairs_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "t.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text[:40]}}",
        "doc_to_choice": [" way", " why"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "tasks").mkdir()
    (directory / "tasks" / "pairs.yaml").write_text(yaml.safe_dump(task))
    return directory


@pytest.fixture(scope="module")
def options_of(
    make_model: Callable[..., Path], quantize_to: Callable[..., Path], data: Path
) -> Callable[..., dict[str, Any]]:
    """The arguments of `evaluate` for a row of the table."""

    def options(recipe: str, tasks: bool, **modes: Any) -> dict[str, Any]:
        source = make_model("llama-tied")
        found = {
            "models": str(quantize_to(source, recipe) if recipe else source),
            "baseline": str(make_model("llama-untied")),
            "data": str(data / "t.jsonl"),
            "context_length": 64,
            "separator": "1",
        }
        if tasks and importlib.util.find_spec("lm_eval") is not None:
            found |= {"tasks": ["pairs_choice"], "task_path": str(data / "tasks")}
        return found | modes

    return options


@pytest.fixture(scope="module")
def check(options_of: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Compares what a row gave with the losses of the plain path in the same dtype."""
    found: dict[tuple[str, str], float] = {}

    def plain(model: str, dtype: str, options: dict[str, Any]) -> float:
        if (model, dtype) not in found:
            alone = options | {"models": model, "dtype": dtype, "fast": False, "stream": False}
            found[model, dtype] = _evaluate(alone)[0]["loss"]
        return found[model, dtype]

    def compare(row: dict[str, Any], records: list[dict[str, Any]]) -> None:
        options, dtype = options_of(row["recipe"], tasks=False), row["dtype"]
        expected = [plain(m, dtype, options) for m in (options.pop("baseline"), options["models"])]
        tolerance = COMPILED[dtype] if row["compile"] else PLAIN[dtype]
        assert [r["loss"] for r in records] == pytest.approx(expected, abs=tolerance)
        assert ("kl" in records[1]) == row["kl"]
        assert bool(records[1].get("tasks")) == ("tasks" in options_of(**row))

    return compare


def _evaluate(options: dict[str, Any]) -> list[dict[str, Any]]:
    return loadstone.evaluate(
        options["models"], **{k: v for k, v in options.items() if k != "models"}
    ).records


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are traced as they are for compiling, and computed without kernels of their own, which take long."""

    def trace(module: Any, **options: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", dynamic=False)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)


@pytest.mark.parametrize("row", pairwise(SHORT), ids=label)
def test_pairs(
    row: dict[str, Any], options_of: Callable[..., dict[str, Any]], check: Callable[..., None], traced: None
) -> None:
    check(row, _evaluate(options_of(**row)))


def test_two_ranks_give_what_one_gives(
    options_of: Callable[..., dict[str, Any]], traced: None, tmp_path: Path
) -> None:
    rows = pairwise({name: values[:2] for name, values in SHORT.items() if name != "tasks"})

    def losses() -> list[list[tuple[float, float]]]:
        found = (_evaluate(options_of(tasks=False, **row)) for row in rows)
        return [[(r["loss"], r.get("kl", 0.0)) for r in records] for records in found]

    def work() -> None:
        found = json.dumps(losses())
        if os.environ["RANK"] == "0":
            (tmp_path / "found.json").write_text(found)

    on_ranks(2, work)
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(losses()))


CHILD = """
import json, os, sys
import loadstone
found = []
for options in json.load(open(sys.argv[1])):
    try:
        found.append(loadstone.evaluate(options.pop("models"), **options).records)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
if os.environ["RANK"] == "0":
    json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_pairs_on_two_ranks(
    options_of: Callable[..., dict[str, Any]], check: Callable[..., None], tmp_path: Path
) -> None:
    """All rows again, compiled, in one job of two processes."""
    (tmp_path / "child.py").write_text(CHILD)
    rows = pairwise(MODES)
    (tmp_path / "rows.json").write_text(json.dumps([options_of(**row) for row in rows]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(tmp_path / name) for name in ("child.py", "rows.json", "out.json")]
    subprocess.run([*launcher, *words], check=True)
    wrong = []
    for row, records in zip(rows, json.loads((tmp_path / "out.json").read_text()), strict=True):
        try:
            if row["recipe"].startswith("mx") and row["dtype"] == "float16":
                assert records.startswith("UsageError: --dtype float16"), records
            else:
                assert isinstance(records, list), records
                check(row, records)
        except AssertionError as error:
            wrong.append(f"{label(row)}: {error}")
    assert not wrong, "\n".join(wrong)

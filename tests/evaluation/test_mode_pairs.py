"""Every two modes of an evaluation that a user can combine, each row of the table holding many pairs at once."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import loadstone
from loadstone.quantization import RECIPES

ON_CPU = ["", *(name for name, recipe in RECIPES.items() if "cpu" in recipe.devices)]
FEW: dict[str, list[Any]] = {
    "recipe": ["", "int8-weight-only", "int8-dynamic-act-int4-weight"],
    "compile": [False, True],
    "fast": [True, False],
    "kl": [False, True],
    "stream": [None, True],
    "dtype": ["auto", "bfloat16"],
}
ALL = FEW | {
    "recipe": ON_CPU,
    "dtype": ["auto", "bfloat16", "float16"],
    "tasks": [False, True],
    "ranks": [1, 2],
}
# How far compiled layers may move a loss, and everything else: they keep more in float32.
COMPILED = {"auto": 2e-3, "bfloat16": 3e-2, "float16": 3e-3}
PLAIN = {"auto": 1e-5, "bfloat16": 2e-3, "float16": 2e-4}


def pairwise(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Few rows in which every two values of different factors meet: always the row with the most that are left."""
    left = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    everything = list(itertools.product(*(range(len(values)) for values in factors.values())))
    rows = []
    while left:
        best = max(everything, key=lambda row: len(_pairs(factors, row) & left))
        left -= _pairs(factors, best)
        rows.append({name: factors[name][at] for name, at in zip(factors, best, strict=True)})
    return rows


def _pairs(factors: dict[str, list[Any]], row: tuple[int, ...]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(pair) for pair in itertools.combinations(zip(factors, row, strict=True), 2)}


def label(row: dict[str, Any]) -> str:
    given = [
        f"{k}={v}"
        for k, v in row.items()
        if v is not None and v is not False and v not in ("", "auto") and (k, v) != ("ranks", 1)
    ]
    return " ".join(given).replace("=True", "")


def test_the_rows_hold_every_pair() -> None:
    rows = pairwise(FEW)
    for a, b in itertools.combinations(FEW, 2):
        assert {(r[a], r[b]) for r in rows} == set(itertools.product(FEW[a], FEW[b]))


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
def check(
    make_model: Callable[..., Path], quantize_to: Callable[..., Path], data: Path
) -> Callable[..., None]:
    """Evaluates a row, and compares its losses with those of the plain path in the same dtype."""
    plain: dict[tuple[str, str], list[float]] = {}

    def run(recipe: str, dtype: str, ranks: int = 1, **modes: Any) -> None:
        source = make_model("llama-tied")
        model = quantize_to(source, recipe) if recipe else source
        common = {
            "baseline": make_model("llama-untied"),
            "data": data / "t.jsonl",
            "context_length": 64,
            "separator": "1",
            "dtype": dtype,
        }
        if (recipe, dtype) not in plain:
            found = loadstone.evaluate(model, **common, fast=False, stream=False)
            plain[recipe, dtype] = [r["loss"] for r in found.records]
        if modes.pop("tasks", False):
            modes |= {"tasks": ["pairs_choice"], "task_path": data / "tasks"}
        evaluate = _evaluate if ranks == 1 else _evaluate_on_two
        records = evaluate(model, common | modes)
        tolerance = COMPILED[dtype] if modes["compile"] else PLAIN[dtype]
        assert [r["loss"] for r in records] == pytest.approx(plain[recipe, dtype], abs=tolerance)
        assert ("kl" in records[1]) == modes["kl"]
        assert bool(records[1].get("tasks")) == ("tasks" in modes)

    return run


def _evaluate(model: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    return loadstone.evaluate(model, **options).records


def _evaluate_on_two(model: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    words = ["eval", "-M", str(model), "--json", "-"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if name == "fast":
            words.append(flag if value else "--no-fast")
        elif value is True:
            words.append(flag)
        elif value not in (None, False):
            words += [flag, ",".join(value) if isinstance(value, list) else str(value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, "-m", "loadstone", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    models: list[dict[str, Any]] = json.loads(done.stdout)["models"]
    return models


@pytest.mark.parametrize("row", pairwise(FEW), ids=label)
def test_pairs(check: Callable[..., None], row: dict[str, Any]) -> None:
    check(**row)


@pytest.mark.slow
@pytest.mark.parametrize("row", pairwise(ALL), ids=label)
def test_all_pairs(check: Callable[..., None], row: dict[str, Any]) -> None:
    if row["tasks"] and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("no lm_eval: `make test-clients` has it")
    check(**row)

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loadstone.errors import MissingError, UsageError
from loadstone.evaluation.harness.tasks import TaskScore, divide, run_tasks, task_records
from loadstone.evaluation.options import Options
from loadstone.evaluation.run import run
from loadstone.ranks import Ranks
from loadstone.text.corpus import read_corpus

PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def rolling_task(data: Path) -> dict[str, Any]:
    return {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {
                "metric": metric,
                "aggregation": "bits_per_byte" if metric == "bits_per_byte" else "weighted_perplexity",
                "higher_is_better": False,
            }
            for metric in PERPLEXITIES
        ],
    }


def choice_task(data: Path) -> dict[str, Any]:
    return {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": [" and", " the", " of", " to"],
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@pytest.fixture
def task_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    documents = read_corpus(limit=8).documents
    data, choices = tmp_path / "text.jsonl", tmp_path / "choice.jsonl"
    data.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    lines = [
        json.dumps({"text": " ".join(d.split()[:12]), "label": i % 4}) for i, d in enumerate(documents * 5)
    ]
    choices.write_text("\n".join(lines))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "text.yaml").write_text(json.dumps(rolling_task(data)))
    (folder / "choice.yaml").write_text(json.dumps(choice_task(choices)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("separator", ["eos", "bos"])
def test_rolling_agrees_with_lm_eval(
    model: Any, tokenizer: Any, bos_tokenizer: Any, save_model: Any, task_path: Path, separator: str
) -> None:
    """Same text, same protocol, same model: word and byte perplexity and bits per byte to 1e-4."""
    chosen = tokenizer if separator == "eos" else bos_tokenizer
    directory = save_model(model, chosen, task_path.parent / "model")
    data = str(task_path.parent / "text.jsonl")
    ours = run(Options((str(directory),), data=data, protocol="rolling")).records[0]
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Left to itself lm-eval puts BOS twice before each document of a tokenizer that adds it, and scores the second.
    adapter = HFLM(pretrained=model, tokenizer=chosen, batch_size=2, add_bos_token=False)
    manager = TaskManager(include_path=str(task_path))
    results = lm_eval.simple_evaluate(
        model=adapter, tasks=["local_text"], task_manager=manager, bootstrap_iters=0
    )
    theirs = results["results"]["local_text"]
    for metric in PERPLEXITIES:
        assert ours[metric] == pytest.approx(theirs[f"{metric},none"], rel=1e-4), metric


@pytest.mark.slow
def test_tasks_in_a_comparison(model_dir: Path, worse_dir: Path, task_path: Path) -> None:
    models = (str(model_dir), str(worse_dir))
    options = Options(models, limit=20, tasks=("local_choice",), task_path=str(task_path), batch_size=4)
    base, worse = (r["tasks"][0] for r in run(options).records)
    assert (base["task"], base["metric"], base["examples"]) == ("local_choice", "acc", 20)
    assert base["delta"] is None and worse["delta"] == pytest.approx(worse["value"] - base["value"])
    assert 0 <= worse["p_value"] <= 1 and base["stderr"] > 0


@pytest.mark.slow
def test_two_processes_give_the_task_scores_of_one(
    model_dir: Path, worse_dir: Path, task_path: Path, tmp_path: Path
) -> None:
    arguments = ["-M", str(model_dir), "-M", str(worse_dir), "--limit", "30", "--batch-size", "2"]
    arguments += ["--tasks", "local_choice,local_text", "--task-path", str(task_path)]
    records = []
    for processes, flag in ((1, "--speed"), (2, "--speed"), (2, "--parallel=tensor")):
        file = tmp_path / f"{processes}.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [
            *launcher,
            str(processes),
            "-m",
            "loadstone",
            "eval",
            *arguments,
            flag,
            "--json",
            str(file),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        records.append(json.loads(file.read_text())["models"])
    for one, two, divided in zip(*records, strict=True):
        assert len(one["tasks"]) == 4 and one["tasks"] == two["tasks"]
        assert [s["batch_size"] for s in two["speed"]] == [1, 2]
        for whole, part in zip(one["tasks"], divided["tasks"], strict=True):
            assert part["examples"] == whole["examples"]
            assert part["value"] == pytest.approx(whole["value"], rel=1e-4)


def test_pieces_do_not_depend_on_the_number_of_processes() -> None:
    texts = [f"{'x' * (i % 7)}{i}" for i in range(50)]
    requests = [SimpleNamespace(args=(text, {})) for text in texts]

    def work(ranks: Ranks) -> tuple[list[list[str]], Any]:
        pieces: list[list[str]] = []

        def compute(some: list[Any], disable_tqdm: bool) -> list[str]:
            pieces.append([r.args[0] for r in some])
            return [r.args[0].upper() for r in some]

        return pieces, divide(compute, requests, 1, ranks)

    alone, results = work(Ranks())
    assert results == [t.upper() for t in texts] and max(map(len, alone)) == 8
    shares: list[dict[int, str]] = []

    class Third(Ranks):
        def gather(self, value: Any) -> list[Any]:
            shares.append(value)
            return [dict(enumerate(results)), value]

    together = [piece for rank in range(3) for piece in work(Third(rank, 3))[0]]
    assert sorted(together) == sorted(alone)
    assert [len(share) for share in shares] == [18, 16, 16]


@pytest.mark.slow
def test_unknown_task(model: Any, tokenizer: Any, task_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no task nonsense.*--task-path"):
        run_tasks(model, tokenizer, ("nonsense",), include=None, limit=1, batch_size=1)


def test_without_lm_eval(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingError, match=r"loadstone\[tasks\]"):
        run_tasks(model, tokenizer, ("x",), include=None, limit=1, batch_size=1)


def test_tasks_are_looked_up_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("planned a model for nothing")

    monkeypatch.setattr("loadstone.evaluation.run.plan_models", no_load)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingError, match=r"loadstone\[tasks\]"):
        run(Options(("m",), tasks=("x",)))
    with pytest.raises(UsageError, match="--task-path is for --tasks"):
        run(Options(("m",), task_path="folder"))


def test_examples_that_all_differ_alike() -> None:
    """No spread, and no chance either."""
    wrong = TaskScore("t", "acc", 0.0, 0.0, True, dict.fromkeys(range(8), 0.0))
    right = TaskScore("t", "acc", 1.0, 0.0, True, dict.fromkeys(range(8), 1.0))
    (record,) = task_records([right], [wrong])
    assert (record["delta"], record["delta_stderr"], record["p_value"]) == (1.0, 0.0, 0.0)


def test_pairing() -> None:
    """40 examples, 30 of them right in both: the paired error counts only the 10 that differ."""
    a = TaskScore("t", "acc", 0.75, 0.07, True, {i: float(i < 30) for i in range(40)})
    b = TaskScore("t", "acc", 1.0, 0.0, True, dict.fromkeys(range(40), 1.0))
    (record,) = task_records([b], [a])
    assert record["delta"] == 0.25
    assert record["delta_stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 39))
    assert record["p_value"] == pytest.approx(math.erfc(0.25 / record["delta_stderr"] / math.sqrt(2)))
    (same,) = task_records([a], [a])
    assert (same["delta"], same["p_value"]) == (0.0, 1.0)
    (alone,) = task_records([a], None)
    assert alone["delta"] is None and alone["p_value"] is None

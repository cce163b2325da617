"""What requests have in common: found, worth it, and the same numbers as reading every request whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone.evaluation.options import Options
from loadstone.evaluation.run import run
from loadstone.evaluation.scoring.common import Group, common_prefixes

START = "It is a truth universally acknowledged, that a single man in possession of a fortune. "


def _brute(rows: list[list[int]], cost: int) -> int:
    """The most tokens that any partition into groups saves."""
    from functools import lru_cache

    def length(members: tuple[int, ...]) -> int:
        n = min(len(rows[m]) for m in members) - 1
        return next((i for i in range(n) if len({rows[m][i] for m in members}) > 1), n)

    @lru_cache(None)
    def best(left: tuple[int, ...]) -> int:
        if not left:
            return 0
        first, rest = left[0], left[1:]
        found = best(rest)
        for mask in range(1, 2 ** len(rest)):
            members = (first, *(m for i, m in enumerate(rest) if mask >> i & 1))
            n = length(members)
            if n >= 16:
                others = tuple(m for m in rest if m not in members)
                found = max(found, (len(members) - 1) * n - cost + best(others))
        return found

    return best(tuple(range(len(rows))))


@pytest.mark.parametrize("seed", range(12))
def test_groups_save_nearly_as_much_as_any_partition(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def some(n: int) -> list[int]:
        return torch.randint(0, 3, (n,), generator=draw).tolist()

    trunk = some(20)
    branches = [trunk + some(25) for _ in range(2)]
    rows = [branches[i % 2][: 18 + 9 * (i % 4)] + some(3 + i % 3) for i in range(7)]
    for cost in (0, 10, 60):
        groups = common_prefixes(rows, cost)
        saved = sum((len(g.members) - 1) * g.length - cost for g in groups)
        assert 0.95 * _brute(rows, cost) <= saved <= _brute(rows, cost)
        for group in groups:
            assert all(
                rows[m][: group.length] == rows[group.members[0]][: group.length] for m in group.members
            )
            assert all(len(rows[m]) > group.length for m in group.members)


def test_what_does_not_pay_is_left_alone() -> None:
    rows = [[*range(100), i] for i in range(4)]
    assert common_prefixes(rows, 299) == [Group(100, (0, 1, 2, 3))]
    assert common_prefixes(rows, 300) == []
    assert common_prefixes([[1] * 15 + [i] for i in range(99)], 0) == []
    assert common_prefixes([], 0) == common_prefixes([[1, 2]], 0) == []


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "questions.jsonl"
    ends = [
        "However little known",
        "the feelings or views",
        "of such a man may be",
        "on his first entering",
        "and more",
    ]
    texts = [START + end * (1 + i % 3) for i, end in enumerate(ends * 3)] + ["Something else altogether."]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_shared_text_scores_as_if_read_whole(
    model_dir: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(
        __import__("loadstone.evaluation.scoring.common", fromlist=["x"])._OVERHEAD, "cpu", 50
    )
    options = Options(models=(str(model_dir),), data=str(questions), protocol="rolling", device="cpu")
    with caplog.at_level("INFO", logger="loadstone"):
        shared = run(options)
    assert "documents' common prefix" in caplog.text
    caplog.clear()
    whole = run(Options(**{**vars(options), "fast": False}))
    assert "documents' common prefix" not in caplog.text
    (a,), (b,) = (list(o.values.values()) for o in (shared, whole))
    assert abs(a["nll"] - b["nll"]).max() < 2e-5
    assert shared.records[0]["tokens"] == whole.records[0]["tokens"]


def test_windows_of_one_text_that_repeats_itself(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They begin alike in the middle of the text, where the token before the first scored one is text too."""
    from loadstone.evaluation.scoring import common

    monkeypatch.setitem(common._OVERHEAD, "cpu", 50)
    (tmp_path / "a.txt").write_text("the feelings or views of such a man may be " * 300)
    options = Options(
        models=(str(model_dir),),
        data=str(tmp_path / "a.txt"),
        protocol="rolling",
        context_length=48,
        device="cpu",
    )
    with caplog.at_level("INFO", logger="loadstone"):
        shared = run(options)
    assert "documents' common prefix" in caplog.text
    whole = run(Options(**{**vars(options), "fast": False}))
    (a,), (b,) = (list(o.values.values()) for o in (shared, whole))
    assert abs(a["nll"] - b["nll"]).max() < 2e-5


def _task(folder: Path, name: str, **more: Any) -> None:
    import yaml

    base = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        **more,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(base))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"q": f"number {i} and some", "right": i % 2} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    header = START * 2
    _task(
        tmp_path, "choices", output_type="multiple_choice", doc_to_text=header + "Q: {{q}}\nA:",
        doc_to_choice=["yes, indeed", "no"], doc_to_target="right", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    _task(
        tmp_path, "answers", output_type="generate_until", doc_to_text=header + "Q: {{q}}\nA:", doc_to_target="q",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 6}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    return tmp_path


def test_tasks_are_the_same_with_and_without_sharing(
    model_factory: Callable[..., Any], tokenizer_factory: Callable[..., Any], tasks: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pytest.importorskip("lm_eval")
    from loadstone.evaluation.harness.sharing_lm import SharingLM

    monkeypatch.setitem(
        __import__("loadstone.evaluation.scoring.common", fromlist=["x"])._OVERHEAD, "cpu", 50
    )
    model = model_factory(max_position_embeddings=512)
    tokenizer = tokenizer_factory()
    tokenizer.pad_token = tokenizer.eos_token
    loglikelihoods, answers = [], []
    for share in (True, False):
        lm = SharingLM(model, tokenizer, batch_size=4, share=share)
        from lm_eval.api.instance import Instance

        contexts = [START * 2 + f"Q: number {i} and some\nA:" for i in range(6)] + ["alone"]
        pairs = [(c, t) for c in contexts for t in (" yes, indeed", " no", " maybe")]
        ask = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        caplog.clear()
        with caplog.at_level("INFO", logger="loadstone"):
            loglikelihoods.append(lm.loglikelihood(ask, disable_tqdm=True))
        assert ("common prefix of" in caplog.text) == share
        generation = {"until": ["\n\n"], "max_gen_toks": 6}
        ask = [Instance("generate_until", {}, (c, generation), i) for i, c in enumerate(contexts[:6])]
        answers.append(lm.generate_until(ask, disable_tqdm=True))
        assert (lm._last is not None) == share
    for (a, same_a), (b, same_b) in zip(*loglikelihoods, strict=True):
        assert abs(a - b) < 2e-5 and same_a == same_b
    assert answers[0] == answers[1]

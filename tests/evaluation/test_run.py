from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import on_ranks

from loadstone.cli import main
from loadstone.errors import UsageError
from loadstone.evaluation.options import Options
from loadstone.evaluation.result import Evaluation
from loadstone.evaluation.results.gates import parse_gate
from loadstone.evaluation.results.pictures import compared
from loadstone.evaluation.run import run

SPEED = ("tokens_per_second", "load_seconds", "peak_memory_bytes", "cached")


def figures(outcome: Evaluation) -> list[dict[str, Any]]:
    """Records without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in SPEED} for r in outcome.records]


@contextmanager
def counting(label: str, total: int, seen: list[int]) -> Iterator[Callable[[int], None]]:
    yield seen.append


def test_records(model_dir: Path, worse_dir: Path) -> None:
    options = Options((str(worse_dir),), baseline=str(model_dir), limit=25, gates=(parse_gate("dloss>9@95"),))
    outcome = run(options)
    base, worse = outcome.records
    assert (base["path"], worse["path"]) == (str(model_dir), str(worse_dir))
    assert worse["delta_loss"] == pytest.approx(worse["loss"] - base["loss"], abs=1e-12)
    assert worse["perplexity"] == pytest.approx(np.exp(worse["loss"]))
    protocol = outcome.task.protocol
    nats = worse["loss"] * protocol.tokens
    assert worse["bits_per_byte"] == pytest.approx(nats / np.log(2) / protocol.bytes)
    assert worse["byte_perplexity"] == pytest.approx(np.exp(nats / protocol.bytes))
    assert worse["word_perplexity"] == pytest.approx(np.exp(nats / protocol.words))
    assert [(v.model, v.failed) for v in outcome.verdicts] == [(str(worse_dir), False)]
    json.dumps(outcome.as_json(), allow_nan=False)


def test_the_first_of_several_is_the_reference(model_dir: Path, worse_dir: Path) -> None:
    outcome = run(Options((str(worse_dir), str(model_dir)), limit=3, gates=(parse_gate("dloss>-9"),)))
    assert [r["reference"] for r in outcome.records] == [True, False]
    assert [v.model for v in outcome.failures] == [str(model_dir)]


def test_absolute_gates_hold_for_every_named_model(model_dir: Path, worse_dir: Path) -> None:
    gate = (parse_gate("loss>0"),)
    both = run(Options((str(model_dir), str(worse_dir)), limit=1, gates=gate))
    assert len(both.failures) == 2
    one = run(Options((str(worse_dir),), baseline=str(model_dir), limit=1, gates=gate))
    assert [v.model for v in one.failures] == [str(worse_dir)]


def test_divergence_goes_into_the_records(model_dir: Path, worse_dir: Path) -> None:
    models = (str(model_dir), str(worse_dir))
    plain = run(Options(models, limit=4))
    outcome = run(Options(models, limit=4, gates=(parse_gate("top1<1%"), parse_gate("kl>9"))))
    base, worse = outcome.records
    assert "kl" not in base and worse["kl"] > 0 and 0.3 < worse["top1_agreement"] < 1
    assert len(worse["worst_documents"]) == 4 and not outcome.failures
    assert worse["delta_loss"] == pytest.approx(plain.records[1]["delta_loss"], abs=1e-6)


@pytest.mark.parametrize("divergence", [False, True])
def test_cache_is_keyed_by_content(
    model_dir: Path, worse_dir: Path, tmp_path: Path, divergence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(
        (str(model_dir), str(worse_dir)), limit=3, cache=str(tmp_path / "cache"), divergence=divergence
    )
    first = run(options)
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(worse_dir), str(moved)], check=True)

    def no_load(plan: Any, mesh: Any) -> Any:
        raise AssertionError("loaded though its scores are in the cache")

    with monkeypatch.context() as patch:
        patch.setattr("loadstone.evaluation.loaded.load", no_load)
        again = run(replace(options, models=(str(model_dir), str(moved))))
        assert all(r["cached"] for r in again.records)
        assert again.records[1]["delta_loss"] == first.records[1]["delta_loss"]
        # Another text, another context, other weights: nothing is found.
        for changed in (replace(options, limit=2), replace(options, context_length=64)):
            with pytest.raises(AssertionError, match="loaded though"):
                run(changed)
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert [r["cached"] for r in run(replace(options, models=(str(model_dir), str(moved)))).records] == [
        not divergence,
        False,
    ]


def test_each_model_is_hashed_once(
    model_dir: Path, worse_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference belongs to the key of every pair."""
    from loadstone.evaluation.models import EvalModel

    real, hashed = EvalModel.fingerprint, []
    monkeypatch.setattr(EvalModel, "fingerprint", lambda m: hashed.append(m.name) or real(m))
    subprocess.run(["cp", "-r", str(worse_dir), str(tmp_path / "copy")], check=True)
    models = (str(model_dir), str(worse_dir), str(tmp_path / "copy"))
    run(Options(models, limit=1, divergence=True, cache=str(tmp_path / "cache")))
    assert sorted(hashed) == sorted(models)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("moment", [4, *(pytest.param(m, marks=pytest.mark.slow) for m in (2, 3, 6, 8))])
def test_killed_and_resumed_is_undisturbed(
    model_dir: Path, worse_dir: Path, tmp_path: Path, moment: int, stop: signal.Signals
) -> None:
    options = Options(
        (str(model_dir), str(worse_dir)),
        limit=4,
        batch_size=4,
        cache=str(tmp_path),
        resume=True,
        save_every=0.0,
    )
    undisturbed = run(replace(options, cache=None, resume=False))
    child = os.fork()
    if child == 0:  # pragma: no cover

        def die(label: str, total: int) -> Any:
            steps: list[int] = []

            def step(tokens: int) -> None:
                steps.append(tokens)
                if len(steps) == moment and label == str(worse_dir):
                    os.kill(os.getpid(), stop)

            return contextmanager(lambda: iter([step]))()

        signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))
        try:
            run(options, die)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert list(tmp_path.rglob("*.partial*.npz")) and list(tmp_path.rglob("*.scores.npz"))
    seen: dict[str, list[int]] = {}
    resumed = run(options, lambda label, total: counting(label, total, seen.setdefault(label, [])))
    assert figures(resumed) == figures(undisturbed)
    # Only the rest of the second model was computed.
    assert list(seen) == [str(worse_dir)] and 0 < sum(seen[str(worse_dir)]) < resumed.task.protocol.tokens
    assert not list(tmp_path.rglob("*.partial*.npz"))


def test_two_processes_give_the_result_of_one(
    model_dir: Path, worse_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = Options((str(model_dir), str(worse_dir)), limit=5, batch_size=2, divergence=True)
    alone = run(options)
    arguments = ["-M", str(model_dir), "-M", str(worse_dir), "--limit", "5", "--batch-size", "2", "--kl"]

    def work() -> None:
        sys.argv = ["loadstone", "eval", *arguments, "--json", str(tmp_path / "two.json")]
        with pytest.raises(SystemExit, match="0"):
            main()

    on_ranks(2, work)
    done = capfd.readouterr()
    assert done.out.count("same top-1") == 1 and done.err.count("computing in") == 1
    together = json.loads((tmp_path / "two.json").read_text())
    for one, two in zip(alone.records, together["models"], strict=True):
        for name, value in one.items():
            if isinstance(value, float) and name not in SPEED:
                assert two[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        assert (one["tokens"], one["documents"]) == (two["tokens"], two["documents"])


def test_options_that_do_not_fit(model_dir: Path, worse_dir: Path) -> None:
    one = (str(model_dir),)
    for options, message in [
        (Options(one, gates=(parse_gate("dloss>0"),)), "needs a baseline"),
        (Options(one, divergence=True), "needs a reference"),
        (Options(one, gates=(parse_gate("kl>1"),)), "needs a baseline"),
        (Options(one, baseline=str(model_dir)), "is the only model"),
        (Options((), limit=1), "no model"),
    ]:
        with pytest.raises(UsageError, match=message):
            run(options)


def test_a_saved_result_is_a_baseline(model_dir: Path, worse_dir: Path, tmp_path: Path) -> None:
    direct = run(Options((str(worse_dir),), baseline=str(model_dir), limit=25))
    file = tmp_path / "base.json"
    file.write_text(json.dumps(run(Options((str(model_dir),), limit=25)).as_json()))
    gates = (parse_gate("dloss>-9@95"),)
    through = run(Options((str(worse_dir),), baseline=str(file), limit=25, gates=gates))
    assert [r["path"] for r in through.records] == [str(model_dir), str(worse_dir)]
    for key in ("delta_loss", "delta_loss_stderr", "delta_loss_interval95", "delta_perplexity"):
        assert through.records[1][key] == direct.records[1][key], key
    assert len(through.failures) == 1
    # Another text or protocol is refused, by the names of what differs.
    for changed, field in (
        ({"limit": 24}, "documents 24 against 25"),
        ({"context_length": 64}, "context_length 64"),
    ):
        with pytest.raises(UsageError, match=field):
            run(Options((str(worse_dir),), baseline=str(file), **{"limit": 25, **changed}))
    with pytest.raises(UsageError, match="needs the baseline itself"):
        run(Options((str(worse_dir),), baseline=str(file), limit=25, divergence=True))


def test_a_saved_result_of_the_same_path_is_not_drawn_as_the_model_itself(
    model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "base.json"
    file.write_text(json.dumps(run(Options((str(model_dir),), limit=1)).as_json()))
    outcome = run(Options((str(model_dir),), baseline=str(file), limit=1))
    assert [r["path"] for r in outcome.records] == [str(model_dir)] * 2
    assert compared(outcome) == []


def test_the_size_of_a_distributed_checkpoint(model: Any, model_dir: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((model_dir / file).read_bytes())
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    plain, sharded = (run(Options((str(d),), limit=1)).records[0] for d in (model_dir, tmp_path))
    assert sharded["loss"] == plain["loss"]
    assert sharded["weight_bytes"] == sum(p.stat().st_size for p in tmp_path.rglob("*.distcp"))
    assert sharded["bits_per_parameter"] > 32


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"protocol": {"name": "packed"}, "models": []}'])
def test_files_that_are_no_result(model_dir: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UsageError, match="is not a result"):
        run(Options((str(model_dir),), baseline=str(tmp_path / "r.json"), limit=1))


def test_wrong_options_show_before_anything_loads(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_load(plan: Any, mesh: Any) -> Any:
        raise AssertionError("loaded a model for nothing")

    monkeypatch.setattr("loadstone.evaluation.loaded.load", no_load)
    with pytest.raises(UsageError):
        run(Options((str(model_dir),), data="absent.txt"))

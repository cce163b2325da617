"""What several processes find in their caches: all go on from the same, whatever lies on the disk of each."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loadstone.evaluation.passes import _cached, _run
from loadstone.evaluation.results.store import Store
from loadstone.evaluation.scoring.losses import Timing
from loadstone.ranks import Ranks

KEY = "ab" * 32
NAN = np.nan


@dataclass(frozen=True)
class WithAnother(Ranks):
    """One process, and what another one says whenever they tell each other."""

    other: Any = None

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]

    def wait(self) -> None:
        pass


def bench(directory: Path, ranks: Ranks) -> Any:
    options = SimpleNamespace(resume=True, save_every=0.0)
    return SimpleNamespace(
        store=Store(directory),
        ranks=ranks,
        options=options,
        progress=lambda *a: nullcontext(lambda step: None),
    )


def test_scores_that_another_process_lacks_are_computed_by_all(tmp_path: Path) -> None:
    Store(tmp_path).finish(KEY, {"nll": np.ones(3)}, {})
    assert _cached(bench(tmp_path, WithAnother(other=False)), KEY, "m") is None
    assert _cached(bench(tmp_path, WithAnother(other=True)), KEY, "m") is not None
    assert _cached(bench(tmp_path / "own", WithAnother(other=True)), KEY, "m") is None


def test_what_processes_have_half_done_is_put_together(tmp_path: Path) -> None:
    Store(tmp_path).save_partial(KEY, 0, {"nll": np.array([1.0, NAN, NAN])})
    begun: list[Any] = []

    def compute(values: Any, **options: Any) -> Any:
        begun.append(values["nll"])
        return {"nll": np.nan_to_num(values["nll"], nan=3.0)}, Timing(1.0, 1)

    for other, expected in (({"nll": np.array([NAN, NAN, 2.0])}, [1, NAN, 2]), (None, [1, NAN, NAN])):
        _run(bench(tmp_path, WithAnother(other=other)), KEY, "m", SimpleNamespace(tokens=3), compute)
        np.testing.assert_array_equal(begun[-1], expected)


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def compute(**options: Any) -> Any:
        raise KeyboardInterrupt

    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        _run(bench(tmp_path, Ranks()), KEY, "m", SimpleNamespace(tokens=3), compute)
    assert "--resume" in caplog.text and str(tmp_path) in caplog.text

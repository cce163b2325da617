"""The recipe that compares Bayesian optimisation with a GP: few trials, and options that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "bayesopt.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("trials", ["1", "2"])
def test_fewer_trials_than_the_table_has_rows(tmp_path: Path, trials: str) -> None:
    pytest.importorskip("botorch")
    picture = tmp_path / "new" / "b.png"
    done = run("--trials", trials, "--seeds", "1", "--out", str(picture))
    assert done.returncode == 0 and picture.is_file(), done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 6 and all(set(r) == {*list(r)[:3], f"regret_at_{trials}"} for r in rows)


def test_no_trials_are_refused() -> None:
    pytest.importorskip("botorch")
    done = run("--trials", "0")
    assert done.returncode == 2 and "not a positive number" in done.stderr

"""A short seeded run of the crash test; ``make crash`` stops every command at every call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.attacks.faults import why_not

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "processes can be watched here")
@pytest.mark.timeout(900)
def test_stopped_at_sampled_calls() -> None:
    command = [sys.executable, "-m", "tests.attacks.crash", "--sample", "3"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    assert ended.stdout.count(" trials in ") == 10

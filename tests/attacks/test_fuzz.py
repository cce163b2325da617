"""Short runs of the fuzzer; ``make fuzz`` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def fuzz(*options: str) -> None:
    """In a process of its own, since one with threads cannot be forked."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.timeout(1200)
def test_seeded_changes() -> None:
    fuzz("--cases", "50")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_no_command_may_open() -> None:
    fuzz("--cases", "0", "--walk", "every")

"""A short seeded run of the fuzzer; ``make fuzz`` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_fuzz() -> None:
    """In a process of its own, since one with threads cannot be forked."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--cases", "150"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]

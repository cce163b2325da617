"""A short seeded run of the fuzzer; ``make fuzz`` is the long one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import fuzz


def test_fuzz() -> None:
    assert fuzz(0, 150) == []

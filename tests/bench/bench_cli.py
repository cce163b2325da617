"""CPU seconds of the commands that must answer at once (user and system time of the whole process; median of 9)."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from tests.conftest import SMOLLM2


def cpu_seconds(*arguments: str) -> float:
    times = []
    for _ in range(9):
        before = os.times()
        subprocess.run([sys.executable, "-m", "loadstone", *arguments], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    return statistics.median(times)


def main() -> None:
    print(f"{'command':<24}{'CPU s':>8}{'limit':>8}")
    for label, limit, arguments in (
        ("--help", 0.2, ["--help"]),
        ("inspect SmolLM2", 0.3, ["inspect", str(SMOLLM2)]),
    ):
        print(f"{label:<24}{cpu_seconds(*arguments):>8.3f}{limit:>8.1f}")

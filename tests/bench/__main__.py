"""``python -m tests.bench [NAME …]``: run the benchmarks (all of those here, or the named) and print their tables."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    found = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
    for name in sys.argv[1:] or found:
        if name not in found:
            sys.exit(f"no benchmark '{name}'; there are: {', '.join(found)}")
        print(f"\n== {name}")
        importlib.import_module(f"tests.bench.bench_{name}").main()


if __name__ == "__main__":
    main()

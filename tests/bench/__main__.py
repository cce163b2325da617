"""``python -m tests.bench [NAME [OPTIONS]]``: run all benchmarks, or the named one, and print their tables."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    found = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
    # Options (`eval --runs 5`) go to the benchmark named before them.
    wanted = sys.argv[1:2] or found
    options = sys.argv[2:]
    for name in wanted:
        if name not in found:
            sys.exit(f"no benchmark '{name}'; there are: {', '.join(found)}")
        print(f"\n== {name}", flush=True)
        sys.argv = [f"bench_{name}", *options]
        importlib.import_module(f"tests.bench.bench_{name}").main()


if __name__ == "__main__":
    main()

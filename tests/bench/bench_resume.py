"""A run killed at five random moments and resumed, and a run on two processes, against an undisturbed one.

python tests/bench/bench_resume.py [-M DIR -M DIR] [--documents 8] [--kills 5] [--seed 1]

Runs save their progress every second here (every 30 by default). Every second kill is a SIGTERM, the others
are SIGKILL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tests.conftest import SMOLLM2

CLOCKED = ("tokens_per_second", "load_seconds", "peak_memory_bytes", "cached")


def child(models: list[str], documents: int, cache: str, out: str) -> None:
    from loadstone.evaluation.options import Options
    from loadstone.evaluation.run import run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    kept = {"cache": cache, "resume": True, "save_every": 1.0} if cache else {}
    outcome = run(Options(tuple(models), data="austen", limit=documents, batch_size=1, **kept))  # type: ignore[arg-type]
    if outcome.first:
        np.savez(out + ".npz", **{str(i): v["nll"] for i, v in enumerate(outcome.values.values())})  # type: ignore[arg-type]
        Path(out).write_text(json.dumps(outcome.as_json()))


def command(args: argparse.Namespace, cache: str, out: Path, *launcher: str) -> list[str]:
    models = [part for model in args.model for part in ("-M", model)]
    options = ["--documents", str(args.documents), "--cache", cache, "--child", str(out)]
    return [sys.executable, *launcher, __file__, *models, *options]


def read(out: Path) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    models = json.loads(out.read_text())["models"]
    with np.load(str(out) + ".npz") as arrays:
        return [{k: v for k, v in m.items() if k not in CLOCKED} for m in models], list(arrays.values())


def done(cache: Path) -> int:
    """Tokens whose losses are on disk."""
    count = 0
    for path in cache.rglob("*.npz"):
        with np.load(path) as arrays:
            count += sum(int(np.isfinite(arrays[k]).sum()) for k in arrays.files if k == "nll")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-M", "--model", action="append", help="default: SmolLM2, where make put it")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or [str(SMOLLM2)]
    if args.child:
        return child(args.model, args.documents, args.cache, args.child)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        begin = time.perf_counter()
        subprocess.run(command(args, "", root / "whole"), check=True)
        whole = time.perf_counter() - begin
        expected, losses = read(root / "whole")
        total = sum(map(len, losses))
        print(f"undisturbed: {whole:.0f} s, {total} losses, loss {expected[-1]['loss']:.15f}", flush=True)
        rng = random.Random(args.seed)
        for number in range(args.kills):
            stop = signal.SIGTERM if number % 2 else signal.SIGKILL
            moment = rng.uniform(0.2, 0.9) * whole
            begin = time.perf_counter()
            process = subprocess.Popen(command(args, str(root / "cache"), root / "resumed"))
            while process.poll() is None and time.perf_counter() - begin < moment:
                time.sleep(0.05)
            process.send_signal(stop)
            code = process.wait()
            kept = done(root / "cache") if (root / "cache").exists() else 0
            print(f"{stop.name} after {moment:4.1f} s: exit {code}, {kept} losses kept", flush=True)
        begin = time.perf_counter()
        subprocess.run(command(args, str(root / "cache"), root / "resumed"), check=True)
        report("resumed", root / "resumed", time.perf_counter() - begin, expected, losses)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        begin = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command(args, "", root / "two", *launcher), check=True, env=environment)
        report("two processes", root / "two", time.perf_counter() - begin, expected, losses)


def report(
    name: str, out: Path, seconds: float, expected: list[dict[str, Any]], losses: list[np.ndarray]
) -> None:
    records, again = read(out)
    bits = all(np.array_equal(a, b) for a, b in zip(again, losses, strict=True))
    apart = max(float(np.abs(a - b).max()) for a, b in zip(again, losses, strict=True))
    print(
        f"{name}: {seconds:.0f} s, loss {records[-1]['loss']:.15f}; every loss the same to the bit: {bits} "
        f"(largest difference {apart:.1e}); every figure of the record: {records == expected}"
    )


if __name__ == "__main__":
    main()

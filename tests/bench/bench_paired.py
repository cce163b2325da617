"""This tree beside another commit: CPU seconds and peak memory of finalize, eval and inspect, in turn, on SmolLM2.

python -m tests.bench paired [--against COMMIT] [--runs 9] [--jobs none,int8-dynamic-act-int4-weight,eval,inspect]

A job is eval (12 documents of `austen`), inspect (ten commands with imports) or the recipe of a finalize. A pair is
one process of each tree, which take turns in going first. The time is user and system time of all threads and children;
of finalize and eval after imports and a run on a tiny model: other work on the machine counts little. Printed are
medians, and the median of the pairs' ratios: above 1 this tree takes more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.bench_finalize import W4, make_llama
from tests.conftest import ROOT, SMOLLM2

# Before finalize held a source to its model, chose weights by their use and carried over every file.
BEFORE = "79afee9"

CHILD = """
import gc, json, logging, os, subprocess, sys
logging.disable(logging.WARNING)
from pathlib import Path
tiny, source, out, job = sys.argv[1:]
if job != "inspect":
    import torch, torchao, transformers
    import torchao.prototype.safetensors.safetensors_support
    import loadstone

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def work(source, out, documents=12):
    if job == "inspect":
        for _ in range(10):
            command = [sys.executable, "-m", "loadstone", "inspect", source]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    elif job == "eval":
        options = {"context_length": 512, "batch_size": 2, "device": "cpu"}
        loadstone.evaluate(source, data="austen", limit=documents, **options)
    else:
        loadstone.finalize(source, out, recipe=None if job == "none" else job, device="cpu")

if job == "eval":
    work("builtin:tiny-llama", out, 1)
elif job != "inspect":
    work(tiny, out + "-tiny")
# A collection of all that the imports made takes 0.25 s, and falls into one side's run or the other's.
gc.collect()
gc.freeze()
Path("/proc/self/clear_refs").write_text("5")
base, before = status("VmRSS"), os.times()
work(source, out)
after = os.times()
used = sum(after[:4]) - sum(before[:4])
print(json.dumps([used, (status("VmHWM") - base) / 2**20]))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", default=BEFORE)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--jobs", default=f"none,{W4},float8-weight-only,eval,inspect")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = subprocess.run(
            ["git", "archive", options.against, "src"], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", name], input=archive.stdout, check=True)
        tiny = make_llama(folder / "tiny", 128, 2, "5GB")
        print(f"| job | CPU s | {options.against} | ratio | MiB | {options.against} | ratio |")
        print("|---|---|---|---|---|---|---|")
        for job in options.jobs.split(","):
            pairs: list[tuple[list[float], list[float]]] = []
            for number in range(options.runs):
                trees = [ROOT, folder]
                found = {tree: run(tree, folder, tiny, job) for tree in trees[:: -1 if number % 2 else 1]}
                pairs.append((found[ROOT], found[folder]))
            print(
                "|",
                job,
                "|",
                " | ".join(column for at in (0, 1) for column in columns(pairs, at)),
                "|",
                flush=True,
            )


def run(tree: Path, folder: Path, tiny: Path, job: str) -> list[float]:
    """CPU seconds and MiB above the base of one job by the sources in ``tree``."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-c", CHILD, str(tiny), str(SMOLLM2), f"{out}/out", job]
        environment = os.environ | {"PYTHONPATH": str(tree / "src")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    used, peak = json.loads(done.stdout.splitlines()[-1])
    return [used, peak]


def columns(pairs: list[tuple[list[float], list[float]]], at: int) -> list[str]:
    """Both medians, and the median ratio."""
    ours, theirs = (statistics.median(side[at] for side in sides) for sides in zip(*pairs, strict=True))
    ratio = statistics.median(one[at] / other[at] for one, other in pairs)
    digits = 2 if at == 0 else 0
    return [f"{ours:.{digits}f}", f"{theirs:.{digits}f}", f"{ratio:.3f}"]


if __name__ == "__main__":
    main()

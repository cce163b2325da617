"""On a GPU: finalize of a synthetic Llama-3-8B-shaped checkpoint beside stock load-quantize-save.

python tests/bench/gpu_finalize.py [--layers 32] [--recipes a,b] [--ways loadstone,stock] [--folder DIR] [--make DIR]
    [--no-limit]

The checkpoint (random bf16, 16 GB with 32 layers) is written to local disk and synced. Each run is a process of its
own, which waits after its imports until it is alone, and reads the source from the page cache. "5 GB" has shards of
that size in place of 2 GB. W4A16 is the serving layout (groups of 128); stock has no writer of it, and its figure is
of the same integers as `intx4-weight-only:group_size=128`. Host memory is anonymous and shared memory above what the
imports took; the limit is reading the source and writing as many bytes as the output has, synced. At the end our
tensors are held to stock's. ``--make DIR`` only makes the checkpoint there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SERVED = "W4A16"
RECIPES = ("int4-weight-only", SERVED, "int8-dynamic-act-int4-weight", "float8-weight-only")
WAYS = ("loadstone", "loadstone 5 GB", "stock")

CHILD = """
import json, logging, os, sys, threading, time
logging.disable(logging.WARNING)
import torch, torchao, transformers, accelerate
import torchao.prototype.safetensors.safetensors_support
from transformers import AutoModelForCausalLM, TorchAoConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
transformers.utils.logging.disable_progress_bar()
from pathlib import Path
import loadstone
from loadstone.finalization.run import write_plan
from loadstone.quantization import parse_recipe, to_torchao

def held():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(l.split()[1]) * 1024 for l in lines if l.startswith(("RssAnon", "RssShmem")))

def watch():
    while not stop.wait(0.005):
        peak[0] = max(peak[0], held())

who, source, out, recipe = sys.argv[1:]
torch.zeros(1, device="cuda")
stop = threading.Event()
layout = "compressed-tensors" if recipe == "W4A16" else "torchao"
recipe = recipe.replace("W4A16", "intx4-weight-only:group_size=128")
# Modules that are imported on first use.
loadstone.plan_finalize("builtin:tiny-llama", recipe="int8-weight-only")
print("ready", flush=True)
if not sys.stdin.readline():
    sys.exit("not wanted")
base, peak = held(), [0]
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
if who.startswith("loadstone"):
    size = "5GB" if who.endswith("5 GB") else "2GB"
    plan = loadstone.plan_finalize(source, recipe=recipe, layout=layout, device="cuda:0", max_shard_size=size)
    write_plan(plan, Path(out), device="cuda:0")
else:
    config = TorchAoConfig(to_torchao(parse_recipe(recipe).scheme))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map={"": "cuda:0"})
    model.save_pretrained(out)
seconds = time.perf_counter() - start
stop.set()
print(json.dumps([seconds, torch.cuda.max_memory_allocated() / 2**20, (peak[0] - base) / 2**20]), flush=True)
# At once: the next run waits for the end of this one.
os._exit(0)
"""


def begin(who: str, source: Path, out: Path, recipe: str) -> subprocess.Popen[str]:
    """A process that imports what it needs and then waits."""
    command = [sys.executable, "-c", CHILD, who, str(source), str(out), recipe]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[list[float] | None, str]:
    """Seconds, peak GPU MiB and peak host MiB; None and the reason when the run failed."""
    assert process.stdout is not None
    process.stdout.readline()
    out, problem = process.communicate("\n")
    if process.returncode:
        print(problem, file=sys.stderr)
        return None, " ".join((problem.strip().splitlines() or ["no message"])[-1].split())[:160]
    return json.loads(out.splitlines()[-1]), ""


def size(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


def limit_seconds(source: Path, nbytes: int, folder: Path) -> float:
    """What reading ``source`` and writing ``nbytes`` of it, synced, takes this machine."""
    share = nbytes / size(source)
    buffer = memoryview(bytearray(16 << 20))
    start = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb", buffering=0) as read, (folder / "copy").open("wb", buffering=0) as written:
            left = int(file.stat().st_size * share)
            while count := read.readinto(buffer):
                left -= written.write(buffer[: min(count, left)]) if left > 0 else 0
            os.fsync(written.fileno())
    (folder / "copy").unlink()
    return time.perf_counter() - start


def equal(ours: Path, stock: Path) -> str:
    """Every 16th tensor of stock's, byte for byte, on the CPU."""
    import torch
    from safetensors import safe_open

    where = {
        key: file
        for file in ours.glob("*.safetensors")
        for key in safe_open(file, "pt").keys()  # noqa: SIM118
    }
    count = 0
    for file in sorted(stock.glob("*.safetensors")):
        with safe_open(file, "pt") as theirs:
            for key in sorted(theirs.keys())[::16]:
                if key not in where:
                    return f"{key} is missing"
                with safe_open(where[key], "pt") as mine:
                    a, b = mine.get_tensor(key), theirs.get_tensor(key)
                if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                    return f"{key} differs"
                count += 1
    return f"{count} tensors compared, all equal"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--make", type=Path, default=None)
    parser.add_argument("--limit", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    from tests.bench.gpu_scaling import make

    if options.make:
        print(f"{make(options.make, '8B', options.layers) / 1e9:.2f} GB in {options.make}")
        return
    with tempfile.TemporaryDirectory(prefix="loadstone-gpu-", dir=options.folder) as name:
        folder = Path(name)
        source = folder / "source"
        recipes, ways = options.recipes.split(","), options.ways.split(",")
        runs = [(recipe, who) for recipe in recipes for who in ways]
        outs = {run: folder / f"{number}" for number, run in enumerate(runs)}
        # All import at once, and wait.
        waiting = {(recipe, who): begin(who, source, outs[recipe, who], recipe) for recipe, who in runs}
        start = time.perf_counter()
        total = make(source, "8B", options.layers)
        import torch
        import torchao
        import transformers

        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"torchao {torchao.__version__}"
        )
        print(
            f"source: {options.layers} layers, {total / 1e9:.2f} GB, made in {time.perf_counter() - start:.0f} s; "
            "largest tensor 1,002 MiB\n"
        )
        print(
            "| recipe | who | s | of the limit | GB out | GPU MiB | host MiB |\n|---|---|---|---|---|---|---|"
        )
        limit = 0.0
        for recipe, who in runs:
            out = outs[recipe, who]
            found, problem = finish(waiting[recipe, who])
            if found is None:
                print(f"| {recipe} | {who} | failed: {problem} | | | | |", flush=True)
                continue
            if options.limit and who == ways[0]:
                limit = limit_seconds(source, size(out), folder)
            print(
                f"| {recipe} | {who} | {found[0]:.1f} | {limit / found[0]:.0%} | {size(out) / 1e9:.2f} | "
                f"{found[1]:.0f} | {found[2]:.0f} |",
                flush=True,
            )
            if who == ways[-1]:
                first = outs[recipe, ways[0]]
                if who == WAYS[-1] and first.exists() and out.exists() and recipe != SERVED:
                    print(f"{recipe}: {equal(first, out)}", flush=True)
                for way in ways:
                    shutil.rmtree(outs[recipe, way], ignore_errors=True)


if __name__ == "__main__":
    main()

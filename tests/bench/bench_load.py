"""Load time and memory of loadstone beside stock `from_pretrained`, each load in a process of its own.

python -m tests.bench load [--parts stock,serving] [--runs 15]

Wall seconds of the load call alone (imports done before), and the peak resident memory above what the imports took.
Every row pairs the two in turn; medians. Stock reads every tensor's metadata for every tensor, so it is left out
above 280 Linears unless FULL=1 is set. ``serving``: SmolLM2 in the compressed-tensors layout beside the dense model,
all loaded in turn in one process after a first time; wall and CPU seconds, and the medians of each turn's ratios.
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

from tests.conftest import SMOLLM2

W4 = "int8-dynamic-act-int4-weight"
SERVED = (
    "intx4-weight-only",
    "intx4-weight-only:mapping=asymmetric",
    "int8-weight-only",
    "float8-weight-only",
    "nvfp4-weight-only",
    "mxfp4-dynamic-act-mxfp4-weight",
)

CHILD = """
import json, logging, resource, sys, time
logging.disable(logging.WARNING)
import torch, torchao, transformers, accelerate
import torchao.prototype.safetensors.safetensors_support
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
transformers.utils.logging.disable_progress_bar()
import loadstone.loading.native, loadstone.loading.loader
torch.set_num_threads(2)

def resident():
    # Peak of this process so far, in bytes.
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))

who, path = sys.argv[1:]
base = resident()
start = time.perf_counter()
model = loadstone.load(path, device="cpu") if who == "loadstone" else AutoModelForCausalLM.from_pretrained(path)
seconds = time.perf_counter() - start
print(json.dumps([seconds, resident() - base]))
"""

IN_TURN = """
import json, logging, sys, time
logging.disable(logging.WARNING)
import loadstone, torch, transformers
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(2)

def load(path):
    wall, used = time.perf_counter(), time.process_time()
    model = loadstone.load(path, device="cpu")
    return time.perf_counter() - wall, time.process_time() - used

runs, *paths = sys.argv[1:]
for _ in range(int(runs) + 1):
    print(json.dumps([load(path) for path in paths]))
"""


def measure(who: str, path: Path) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, who, str(path)], capture_output=True, text=True, check=True
    )
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak / 2**20


def pair(
    path: Path, *, stock: bool = True, repeats: int = 3
) -> tuple[tuple[float, float], tuple[float, float] | None]:
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(measure("loadstone", path))
        if stock:
            theirs.append(measure("stock", path))
    median = [statistics.median(values) for values in zip(*ours, strict=True)]
    other = [statistics.median(values) for values in zip(*theirs, strict=True)] if stock else None
    return (median[0], median[1]), (other[0], other[1]) if other else None


def make_llama(layers: int, out: Path) -> None:
    """A Llama of tiny width with seven Linears a layer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)


def quantize(source: Path, recipe: str, out: Path, layout: str = "torchao") -> Path:
    from loadstone.artifact import detect
    from loadstone.finalization.encoders import encoder_for
    from loadstone.finalization.plan import make_plan
    from loadstone.finalization.run import write_plan
    from loadstone.quantization import parse_recipe

    write_plan(make_plan(detect(source), parse_recipe(recipe), encoder=encoder_for(layout)), out)
    return out


def serving(root: Path, runs: int) -> None:
    """One row for each scheme of the serving layout."""
    paths = [
        SMOLLM2,
        *(quantize(SMOLLM2, name, root / f"served-{name}", "compressed-tensors") for name in SERVED),
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, str(runs), *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    turns = [json.loads(line) for line in done.stdout.splitlines()][1:]
    print("| SmolLM2 | wall s | of dense | CPU s | of dense |\n|---|---|---|---|---|")
    for at, name in enumerate(("bf16", *SERVED)):
        wall, used = (statistics.median(turn[at][kind] for turn in turns) for kind in (0, 1))
        more = [statistics.median(turn[at][kind] / turn[0][kind] for turn in turns) for kind in (0, 1)]
        print(f"| {name} | {wall:.3f} | {more[0]:.2f} | {used:.3f} | {more[1]:.2f} |")


def row(label: str, ours: tuple[float, float], theirs: tuple[float, float] | None, stored: int) -> None:
    size = stored / 2**20
    stock = (
        f"{theirs[0]:>10.2f}{theirs[0] / ours[0]:>8.1f}x{theirs[1]:>12.0f}"
        if theirs
        else f"{'-':>10}{'-':>9}{'-':>12}"
    )
    print(f"{label:<34}{ours[0]:>10.2f}{stock}{ours[1]:>12.0f}{ours[1] / size:>9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="stock,serving")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "stock" in options.parts:
            beside_stock(Path(folder))
        if "serving" in options.parts:
            serving(Path(folder), options.runs)


def beside_stock(root: Path) -> None:
    print(
        f"{'':<34}{'ours s':>10}{'stock s':>10}{'ratio':>9}{'stock MiB':>12}{'ours MiB':>12}{'/tensors':>9}"
    )
    full = os.environ.get("FULL") == "1"
    for layers in (20, 40, 80, 160):
        dense = root / f"dense{layers}"
        make_llama(layers, dense)
        packed = quantize(dense, W4, root / f"w4-{layers}")
        for label, path, stock in (
            ("bf16", dense, True),
            ("w4", packed, layers <= 40 or (full and layers <= 80)),
        ):
            size = (path / "model.safetensors").stat().st_size
            row(
                f"{7 * layers} Linears {label}",
                *pair(path, stock=stock, repeats=3 if layers <= 40 else 1),
                size,
            )
    for recipe in (None, "int8-weight-only", W4, "nvfp4-weight-only"):
        path = quantize(SMOLLM2, recipe, root / recipe) if recipe else SMOLLM2
        row(
            f"SmolLM2 {recipe or 'bf16'}",
            *pair(path, repeats=5),
            (path / "model.safetensors").stat().st_size,
        )

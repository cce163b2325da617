"""Memory and time of an export at two model sizes, and beside ModelOpt's export of the same offloaded model.

Each run is a process of its own: peak anonymous memory above what it held before the work (imports, and of a live model
what is not on disk), and wall seconds of the work. Live: all decoder layers on disk, calibrated on 16 tokens, folded to
FP8 and written. ModelOpt (where MODELOPT_PYTHON names a Python that has it): ``mtq.quantize`` and then its in-place
export, the only one of its exports that takes offloaded models. ``--layers 8 48`` sets the sizes, ``--runs 3`` the runs
of each, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT

SHARD = 100_000_000

MAKE = """
import sys, torch, transformers
from transformers.initialization import no_init_weights
config = transformers.LlamaConfig(vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_attention_heads=16,
                                  num_key_value_heads=16, num_hidden_layers=int(sys.argv[2]), tie_word_embeddings=False)
torch.manual_seed(0)
with no_init_weights():
    model = transformers.LlamaForCausalLM(config).bfloat16()
for p in model.parameters():
    p.data.normal_(0, 0.02)
model.save_pretrained(sys.argv[1], max_shard_size=int(sys.argv[3]))
"""

CHILD = """
import copy, gc, json, sys, threading, time, warnings
warnings.filterwarnings("ignore")
import torch, transformers, accelerate
transformers.utils.logging.disable_progress_bar()
who, source, out, folder, form, shard = sys.argv[1:]
torch.set_num_threads(2)
import loadstone, loadstone.fakequant.live
from loadstone.fakequant.formats.fold import fold
from loadstone.fakequant.options import make_options
from loadstone.fakequant import export_fakequant, plan_export

def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))

peak, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], anonymous())

ids = torch.arange(3, 19)[None]
if who != "directory":
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    layers = {f"model.layers.{i}": "disk" for i in range(model.config.num_hidden_layers)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = accelerate.dispatch_model(model, rest | layers, offload_dir=folder, main_device="cpu", force_hooks=True)
if who == "directory":
    work = lambda: export_fakequant(source, out, format=form, device="cpu")
elif who == "live":
    options = {"format": form, "device": "cpu", "max_shard_size": int(shard), "calibrate": [ids]}
    work = lambda: export_fakequant(model, out, **options)
else:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.plugins.vllm_fakequant_hf import export_hf_vllm_fq_checkpoint
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG) | {"algorithm": "max"}
    def work():
        mtq.quantize(model, config, lambda m: m(ids))
        export_hf_vllm_fq_checkpoint(model, export_dir=out, inplace_mem_efficient=True)
# What an export imports on its way is no memory of the model.
plan_export(source, format=form)
fold("w", torch.ones(64, 64).bfloat16(), make_options(format=form).rules.default.weight)
gc.collect()
base = anonymous()
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
work()
seconds = time.perf_counter() - start
stop.set()
print(json.dumps([(peak[0] - base) / 1e6, seconds]))
"""


def run(python: str, code: str, *args: object) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([python, "-c", code, *map(str, args)], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.splitlines()[-1] if done.stdout else ""


def same_weights(one: Path, other: Path) -> bool:
    """Whether two directories hold the same tensors under the same names, bit for bit."""
    import torch
    from safetensors import safe_open

    def places(folder: Path) -> dict[str, Path]:
        found = {}
        for path in sorted(folder.glob("model*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    ours, theirs = places(one), places(other)
    if ours.keys() != theirs.keys():
        return False
    for name in ours:
        with safe_open(ours[name], "pt") as a, safe_open(theirs[name], "pt") as b:
            if not torch.equal(a.get_tensor(name), b.get_tensor(name)):
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 48])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    oracle = os.environ.get("MODELOPT_PYTHON", "")
    jobs = [("directory", "nvfp4"), ("directory", "fp8"), ("live", "fp8")] + [("modelopt", "fp8")] * bool(
        oracle
    )
    print("| export | format | model MB | peak MB | s |\n|---|---|---|---|---|")
    for layers in options.layers:
        with tempfile.TemporaryDirectory(prefix="loadstone-bench-") as name:
            folder = Path(name)
            run(sys.executable, MAKE, folder / "model", layers, SHARD)
            size = sum(p.stat().st_size for p in (folder / "model").glob("*.safetensors")) / 1e6
            found: dict[tuple[str, str], list[list[float]]] = {job: [] for job in jobs}
            for number in range(options.runs):
                for who, form in jobs:
                    # Only to show what the slowest format takes: once.
                    if number and form == "nvfp4":
                        continue
                    python = oracle if who == "modelopt" else sys.executable
                    with tempfile.TemporaryDirectory(dir=folder) as offload:
                        out = folder / f"{who}-{form}"
                        shutil.rmtree(out, ignore_errors=True)
                        line = run(python, CHILD, who, folder / "model", out, offload, form, SHARD)
                    found[who, form].append(json.loads(line))
            for (who, form), runs in found.items():
                peak, seconds = (statistics.median(values) for values in zip(*runs, strict=True))
                print(f"| {who} | {form} | {size:.0f} | {peak:+.0f} | {seconds:.1f} |", flush=True)
            if oracle:
                pairs = list(zip(found["live", "fp8"], found["modelopt", "fp8"], strict=True))
                memory, time = (statistics.median(b[i] / a[i] for a, b in pairs) for i in (0, 1))
                same = same_weights(folder / "live-fp8", folder / "modelopt-fp8")
                print(
                    f"ModelOpt's over live at {size:.0f} MB: {memory:.2f} x the memory, {time:.2f} x the time; "
                    f"same weights, bit for bit: {same}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

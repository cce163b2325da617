"""Memory and time of an export, at two model sizes, beside ModelOpt's own in-place export of the same model.

Each row is a process of its own: peak anonymous memory above what imports (and, for a live model, what of it is not
on disk) took, and wall seconds of the export alone. ModelOpt is measured where MODELOPT_PYTHON names a Python
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT

LAYERS = (4, 16)
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
import gc, json, sys, threading, time, warnings
warnings.filterwarnings("ignore")
import torch, transformers, accelerate
transformers.utils.logging.disable_progress_bar()
who, source, out, folder, form = sys.argv[1:]
torch.set_num_threads(2)
import loadstone, loadstone.loading.loader
from loadstone.fakequant.run import export_fakequant
import loadstone.fakequant.live

def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))

peak, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.005):
        peak[0] = max(peak[0], anonymous())

def live():
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(3, 19)[None]
    layers = {f"model.layers.{i}": "disk" for i in range(model.config.num_hidden_layers)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return accelerate.dispatch_model(model, rest | layers, offload_dir=folder, main_device="cpu", force_hooks=True), ids

if who == "directory":
    work = lambda: export_fakequant(source, out, format=form, device="cpu")
elif who == "live":
    model, _ = live()
    work = lambda: export_fakequant(model, out, format=form, device="cpu", max_shard_size=100_000_000)
else:
    import copy
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.plugins.vllm_fakequant_hf import export_hf_vllm_fq_checkpoint
    model, ids = live()
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG) | {"algorithm": "max"}
    mtq.quantize(model, config, lambda m: m(ids))
    work = lambda: export_hf_vllm_fq_checkpoint(model, export_dir=out, inplace_mem_efficient=True)
# What an export imports on its way is no memory of the model.
from loadstone.fakequant.options import make_options
from loadstone.fakequant.run import plan_for
from loadstone.fakequant.formats.fold import fold
plan_for(loadstone.detect(source), make_options(format=form))
fold("w", torch.ones(64, 64).bfloat16(), make_options(format=form).rules.default.weight)
gc.collect()
base = anonymous()
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
failure = ""
try:
    work()
except Exception as error:
    failure = f"{type(error).__name__}: {str(error)[:60]}"
stop.set()
print(json.dumps([peak[0] - base, time.perf_counter() - start, failure]))
"""


def run(python: str, code: str, *args: object) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([python, "-c", code, *map(str, args)], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.splitlines()[-1] if done.stdout else ""


def main() -> None:
    oracle = os.environ.get("MODELOPT_PYTHON", "")
    rows = [("directory", "nvfp4"), ("directory", "fp8"), ("live", "fp8")] + [("modelopt", "fp8")] * bool(
        oracle
    )
    print("| export | format | model MB | peak MB | s | |\n|---|---|---|---|---|---|")
    for layers in LAYERS:
        with tempfile.TemporaryDirectory(prefix="loadstone-bench-") as folder:
            source = Path(folder) / "model"
            run(sys.executable, MAKE, source, layers, SHARD)
            size = sum(p.stat().st_size for p in source.glob("*.safetensors")) / 1e6
            for number, (who, form) in enumerate(rows):
                out = Path(folder) / f"out{number}"
                python = oracle if who == "modelopt" else sys.executable
                peak, seconds, failure = json.loads(
                    run(python, CHILD, who, source, out, Path(folder) / f"offload{number}", form)
                )
                print(
                    f"| {who} | {form} | {size:.0f} | {peak / 1e6:+.0f} | {seconds:.1f} | {failure} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

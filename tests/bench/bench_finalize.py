"""Finalize: time beside stock load-quantize-save, peak memory by size, and a dry run on the headers of a 671B model.

Each run in a process of its own; wall seconds and peak resident memory above what the imports took. ``GB=3`` sets the
size of the synthetic checkpoint that is timed (1 by default).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import SMOLLM2

W4 = "int8-dynamic-act-int4-weight"

CHILD = """
import json, logging, sys, time
logging.disable(logging.WARNING)
import torch, torchao, transformers, accelerate
import torchao.prototype.safetensors.safetensors_support
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
transformers.utils.logging.disable_progress_bar()
from pathlib import Path
import loadstone
from loadstone.finalize import finalize, make_plan
from loadstone.quantization import parse_recipe, to_torchao

def resident():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))

who, source, out, recipe = sys.argv[1:]
base, start = resident(), time.perf_counter()
if who == "loadstone":
    finalize(make_plan(loadstone.detect(source), parse_recipe(recipe)), Path(out))
else:
    config = TorchAoConfig(to_torchao(parse_recipe(recipe).scheme))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(out)
print(json.dumps([time.perf_counter() - start, (resident() - base) / 2**20]))
"""


def run(who: str, source: Path, recipe: str = W4) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, who, str(source), f"{folder}/out", recipe]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def make_llama(out: Path, hidden: int, layers: int, shard: str) -> None:
    """A random Llama whose largest tensor is 3 x hidden x hidden."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out, max_shard_size=shard)


def copy_seconds(source: Path) -> float:
    """What reading the source and writing as many bytes takes this machine."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for file in source.glob("*.safetensors"):
            shutil.copyfile(file, Path(folder) / file.name)
            with (Path(folder) / file.name).open("rb") as copied:
                os.fsync(copied.fileno())
        return time.perf_counter() - start


def write_headers(out: Path) -> int:
    """Sparse shards with the headers of a 671B mixture of experts (DeepSeek-V3's shape); returns the tensors."""
    hidden, experts, inner = 7168, 256, 2048
    tensors: dict[str, list[int]] = {
        "model.embed_tokens.weight": [129280, hidden],
        "lm_head.weight": [129280, hidden],
    }
    tensors["model.norm.weight"] = [hidden]
    for layer in range(61):
        p = f"model.layers.{layer}"
        tensors |= {
            f"{p}.input_layernorm.weight": [hidden],
            f"{p}.post_attention_layernorm.weight": [hidden],
            f"{p}.self_attn.q_a_proj.weight": [1536, hidden],
            f"{p}.self_attn.q_a_layernorm.weight": [1536],
            f"{p}.self_attn.q_b_proj.weight": [24576, 1536],
            f"{p}.self_attn.kv_a_proj_with_mqa.weight": [576, hidden],
            f"{p}.self_attn.kv_a_layernorm.weight": [512],
            f"{p}.self_attn.kv_b_proj.weight": [32768, 512],
            f"{p}.self_attn.o_proj.weight": [hidden, 16384],
        }
        names = [f"{p}.mlp"] if layer < 3 else [f"{p}.mlp.shared_experts"]
        names += [f"{p}.mlp.experts.{e}" for e in range(experts)] if layer >= 3 else []
        for name in names:
            width = 18432 if layer < 3 else inner
            tensors |= {
                f"{name}.gate_proj.weight": [width, hidden],
                f"{name}.up_proj.weight": [width, hidden],
            }
            tensors[f"{name}.down_proj.weight"] = [hidden, width]
        if layer >= 3:
            tensors[f"{p}.mlp.gate.weight"] = [experts, hidden]
            tensors[f"{p}.mlp.gate.e_score_correction_bias"] = [experts]
    out.mkdir()
    names = list(tensors)
    count = 163
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        header, position = {}, 0
        for name in names[number * len(names) // count : (number + 1) * len(names) // count]:
            size = 2 * tensors[name][0] * (tensors[name][1] if len(tensors[name]) > 1 else 1)
            header[name] = {
                "dtype": "BF16",
                "shape": tensors[name],
                "data_offsets": [position, position + size],
            }
            weight_map[name] = file
            position += size
        raw = json.dumps(header).encode()
        with (out / file).open("wb") as handle:
            handle.write(struct.pack("<Q", len(raw)) + raw)
            handle.truncate(8 + len(raw) + position)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    from transformers import DeepseekV3Config

    DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16").save_pretrained(out)
    return len(tensors)


def main() -> None:
    gigabytes = float(os.environ.get("GB", "1"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print(
            f"{'time':<34}{'ours s':>9}{'stock s':>9}{'ratio':>8}{'copy s':>9}{'ours MiB':>10}{'stock MiB':>11}"
        )
        big = root / "big"
        make_llama(big, 1024, max(int(gigabytes * 1e9 / 2 / (13 * 1024**2)), 1), "500MB")
        for label, source in (("SmolLM2", SMOLLM2), (f"synthetic {gigabytes:g} GB", big)):
            pairs = [(run("loadstone", source), run("stock", source)) for _ in range(3)]
            ours = [statistics.median(p[0][i] for p in pairs) for i in (0, 1)]
            stock = [statistics.median(p[1][i] for p in pairs) for i in (0, 1)]
            print(
                f"{label:<34}{ours[0]:>9.1f}{stock[0]:>9.1f}{stock[0] / ours[0]:>7.1f}x{copy_seconds(source):>9.1f}"
                f"{ours[1]:>10.0f}{stock[1]:>11.0f}",
                flush=True,
            )
        shutil.rmtree(big)
        print(
            f"\n{'memory, shards of equal size':<34}{'source MB':>10}{'largest tensor MB':>19}{'peak MiB':>10}"
        )
        for layers in (4, 40):
            source = root / f"m{layers}"
            make_llama(source, 1024, layers, "28MB")
            size = sum(f.stat().st_size for f in source.glob("*.safetensors")) / 1e6
            _, peak = run("loadstone", source)
            print(
                f"{layers} layers{'':<26}{size:>10.0f}{3 * 1024**2 * 2 / 1e6:>19.1f}{peak:>10.0f}", flush=True
            )
            shutil.rmtree(source)
        count = write_headers(root / "headers")
        arguments = [
            "finalize",
            "-M",
            str(root / "headers"),
            "--quantize",
            W4,
            "--dry-run",
            "--json",
            "--quiet",
        ]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "loadstone", *arguments], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        outcome = (
            f"{json.loads(done.stdout)['bytes_after'] / 1e9:.1f} GB after"
            if done.returncode == 0
            else done.stderr
        )
        print(f"\ndry run on 671B headers ({count} tensors): {seconds:.1f} s with imports; {outcome}")

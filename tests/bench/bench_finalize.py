"""Finalize: time beside stock load-quantize-save and a plain copy, peak memory by size, a dry run on 671B headers.

python -m tests.bench finalize [--parts time,limit,serving,memory,other,headers,fp8] [--gb 3] [--runs 3]

Each run in a process of its own, sides in turn, medians. Before the clock starts, imports are done and a tiny model
has been through the same code. Memory is the peak resident set above what was resident then. The limit is reading the
source and writing as many bytes as the output has, synced. ``limit``: ours beside it, and beside the same while two
threads hash as many bytes as finalize hashes, those of the source and of the output. ``serving``: the compressed-
tensors layout beside torchao's. ``other`` is llm-compressor's ``model_free_ptq`` and auto-round's ``--model_free``,
when LLMCOMPRESSOR and AUTOROUND name the Pythons of environments that have them: FP8 beside torchao's layout, and
W4A16 beside the same scheme in the compressed-tensors layout. auto-round works in processes of its own, whose start
is part of its time. ``fp8``: an FP8 checkpoint to plain bfloat16 weights, beside transformers' `dequantize=True` and
a save.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.gpu_finalize import limit_seconds, size
from tests.conftest import SMOLLM2
from tests.finalization.headers import write_headers
from tests.packed import fp8

W4 = "int8-dynamic-act-int4-weight"
SERVED = "intx4-weight-only"
# Other programs, and the variable that names the Python of each.
PEERS = {"llm-compressor": "LLMCOMPRESSOR", "auto-round": "AUTOROUND"}

CHILD = """
import json, logging, os, resource, sys, time
logging.disable(logging.WARNING)
from pathlib import Path
who, tiny, source, out, recipe = sys.argv[1:]
if who == "llm-compressor":
    from loguru import logger
    logger.remove()
    from llmcompressor import model_free_ptq
    def work(source, out):
        kept = ["lm_head", "model.embed_tokens"]
        scheme = "FP8_DYNAMIC"
        if recipe.startswith("intx4"):
            from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
            args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
        model_free_ptq(source, out, scheme=scheme, ignore=kept, device="cpu", max_workers=2)
elif who == "auto-round":
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme
    def work(source, out):
        scheme = QuantizationScheme(bits=4, group_size=32, sym=True, data_type="int", act_bits=16)
        # It asks for a tokenizer and has no use for it.
        AutoRound(source, scheme=scheme, model_free=True, device_map="cpu", tokenizer=object()).quantize_and_save(out)
else:
    import torch, torchao, transformers, accelerate
    import torchao.prototype.safetensors.safetensors_support
    from transformers import AutoModelForCausalLM, TorchAoConfig
    transformers.utils.logging.disable_progress_bar()
    import loadstone
    from loadstone.finalization.plan import make_plan
    from loadstone.finalization.run import write_plan
    from loadstone.finalization.encoders import encoder_for
    from loadstone.quantization import parse_recipe, to_torchao
    def work(source, out):
        if recipe == "none" and who == "loadstone":
            loadstone.finalize(source, out, device="cpu")
        elif recipe == "none":
            model = AutoModelForCausalLM.from_pretrained(
                source, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), device_map="cpu"
            )
            # Or a save would quantize it again.
            model._weight_conversions = None
            model.save_pretrained(out)
        elif who in ("loadstone", "served"):
            encoder = encoder_for("compressed-tensors" if who == "served" else "torchao")
            write_plan(make_plan(loadstone.detect(source), parse_recipe(recipe), encoder=encoder), Path(out))
        else:
            config = TorchAoConfig(to_torchao(parse_recipe(recipe).scheme))
            model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
            model.save_pretrained(out)

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

work(tiny, out + "-tiny")
Path("/proc/self/clear_refs").write_text("5")
base, start, used = status("VmRSS"), time.perf_counter(), sum(os.times()[:4])
work(source, out)
seconds, used = time.perf_counter() - start, sum(os.times()[:4]) - used
# A process that worked for this one has the same imports.
worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
peak = status("VmHWM") - base + max(worker - base, 0)
print(json.dumps([seconds, used, peak / 2**20]))
"""


class Bench:
    """One child at a time; ``last`` is the size of the weights that the last one wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = folder / "tiny"
        make_llama(self.tiny, 128, 2, "5GB")
        self.last = 0

    def run(self, who: str, source: Path, recipe: str = W4) -> list[float]:
        """Seconds, CPU seconds of all threads, and MiB above the base."""
        python = os.environ[PEERS[who]] if who in PEERS else sys.executable
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            command = [python, "-c", CHILD, who, str(self.tiny), str(source), f"{folder}/out", recipe]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{who}: {done.stderr[-2000:]}")
            self.last = size(Path(folder) / "out")
        return json.loads(done.stdout.splitlines()[-1])


def make_llama(out: Path, hidden: int, layers: int, shard: str) -> Path:
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
    return out


def compare(
    bench: Bench, label: str, source: Path, recipe: str, other: str, runs: int, us: str = "loadstone"
) -> None:
    """One row: ours and another's seconds and MiB, in turn, and the limit."""
    ours, theirs, limits = [], [], []
    for _ in range(runs):
        ours.append(bench.run(us, source, recipe))
        limits.append(limit_seconds(source, bench.last, bench.folder))
        theirs.append(bench.run(other, source, recipe))
    mine, his = ([statistics.median(r[i] for r in each) for i in (0, 1, 2)] for each in (ours, theirs))
    limit = statistics.median(limits)
    served = " (served)" if us == "served" else ""
    print(
        f"| {label} | {recipe}{served} | {mine[0]:.1f} | {other} {his[0]:.1f} | {his[0] / mine[0]:.1f}x | "
        f"{mine[1]:.1f} | {his[1]:.1f} | {his[1] / mine[1]:.1f}x | {limit / mine[0]:.0%} | "
        f"{mine[2]:.0f} | {his[2]:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="time,limit,serving,memory,other,headers,fp8")
    parser.add_argument("--gb", type=float, default=1)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    parts = options.parts.split(",")
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        if {"time", "other", "serving"} & set(parts):
            times(bench, parts, options.gb, options.runs)
        if "limit" in parts:
            limits(bench, options.gb, options.runs)
        if "memory" in parts:
            memory(bench)
        if "fp8" in parts:
            float8(bench, options.gb, options.runs)
        if "headers" in parts:
            headers(bench.folder)


def synthetic(bench: Bench, gigabytes: float) -> Path:
    layers = max(int(gigabytes * 1e9 / 2 / (13 * 2048**2)), 1)
    return make_llama(bench.folder / "big", 2048, layers, "500MB")


def limits(bench: Bench, gigabytes: float, runs: int) -> None:
    """Ours beside copies of the bytes, plain and hashed: the copy's seconds and what share of ours they are."""
    big = synthetic(bench, gigabytes)
    print(
        "\n| source | recipe | s | CPU s | copy s | of ours | hashed s | of ours | hashed CPU s | of ours |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for recipe in ("none", W4, SERVED):
        found = []
        for _ in range(runs):
            seconds, used, _ = bench.run("loadstone", big, recipe)
            copied = limit_seconds(big, bench.last, bench.folder)
            found.append((seconds, used, copied, *hashed_copy(big, bench.last, bench.folder)))
        seconds, used, copied, hashed, hashed_used = map(statistics.median, zip(*found, strict=True))
        shares = [statistics.median(run[i] / run[of] for run in found) for i, of in ((2, 0), (3, 0), (4, 1))]
        print(
            f"| {size(big) / 1e9:.1f} GB | {recipe} | {seconds:.1f} | {used:.1f} | {copied:.1f} | {shares[0]:.0%} | "
            f"{hashed:.1f} | {shares[1]:.0%} | {hashed_used:.1f} | {shares[2]:.0%} |",
            flush=True,
        )
    shutil.rmtree(big)


def hashed_copy(source: Path, nbytes: int, folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of `limit_seconds` while one thread hashes ``source`` and one ``nbytes`` of it."""

    def digest(left: int) -> None:
        total, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
        for file in sorted(source.glob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                while left and (count := opened.readinto(buffer[: min(left, 1 << 20)])):
                    total.update(buffer[:count])
                    left -= count

    start, used = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        hashing = [pool.submit(digest, each) for each in (size(source), nbytes)]
        limit_seconds(source, nbytes, folder)
        for each in hashing:
            each.result()
    return time.perf_counter() - start, time.process_time() - used


def times(bench: Bench, parts: list[str], gigabytes: float, runs: int) -> None:
    """Seconds and peaks beside stock, llm-compressor and auto-round."""
    big = synthetic(bench, gigabytes)
    print("| source | recipe | s | other s | faster | CPU s | other | less | of the limit | MiB | other |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for label, source in (("SmolLM2", SMOLLM2), (f"synthetic {size(big) / 1e9:.1f} GB", big)):
        if "time" in parts:
            compare(bench, label, source, W4, "stock", runs)
        if "serving" in parts:
            compare(bench, label, source, SERVED, "loadstone", runs, us="served")
        if "other" in parts and "LLMCOMPRESSOR" in os.environ:
            compare(bench, label, source, "float8-weight-only", "llm-compressor", runs)
            compare(bench, label, source, SERVED, "llm-compressor", runs, us="served")
        if "other" in parts and "AUTOROUND" in os.environ:
            compare(bench, label, source, SERVED, "auto-round", runs, us="served")
    shutil.rmtree(big)


def float8(bench: Bench, gigabytes: float, runs: int) -> None:
    """An FP8 source of so many gigabytes to plain weights."""
    plain = make_llama(bench.folder / "plain", 2048, max(int(gigabytes * 1e9 / (13 * 2048**2)), 1), "500MB")
    source = fp8(plain, bench.folder / "fp8")
    shutil.rmtree(plain)
    make_llama(bench.folder / "small", 128, 2, "5GB")
    shutil.rmtree(bench.tiny)
    fp8(bench.folder / "small", bench.tiny)
    print("\n| source | recipe | s | other s | faster | CPU s | other | less | of the limit | MiB | other |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    compare(bench, f"FP8 {size(source) / 1e9:.1f} GB", source, "none", "stock", runs)


def memory(bench: Bench) -> None:
    """4 and 40 shards of equal size: a layer each."""
    print(
        "\n| shards | source MB | largest tensor MiB | peak MiB | of the largest tensor |\n|---|---|---|---|---|"
    )
    for layers in (4, 40):
        source = make_llama(bench.folder / f"m{layers}", 2048, layers, "110MB")
        peak = bench.run("loadstone", source)[2]
        largest = 3 * 2048**2 * 2 / 2**20
        print(
            f"| {len(list(source.glob('*.safetensors')))} | {size(source) / 1e6:.0f} | {largest:.0f} | {peak:.0f} | "
            f"{peak / largest:.2f} |",
            flush=True,
        )
        shutil.rmtree(source)


def headers(folder: Path) -> None:
    """The whole command with its imports, three times: the first reads the libraries' files from disk."""
    dry_runs(folder / "headers", write_headers(folder / "headers"), "--quantize", W4)
    count = write_headers(folder / "published", fp8=True)
    options = ("--quantize", "intx4-weight-only:group_size=128", "--layout", "compressed-tensors")
    dry_runs(folder / "published", count, *options)


def dry_runs(source: Path, count: int, *options: str) -> None:
    """Time of the plan of a source of ``count`` tensors."""
    arguments = ["finalize", "-M", str(source), *options, "--dry-run", "--json", "--quiet"]
    print(f"\ndry run on the headers of a 671B model ({count} tensors):")
    for which in ("first", "again", "again"):
        start = time.perf_counter()
        before = os.times()
        command = [sys.executable, "-m", "loadstone", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        outcome = (
            f"{json.loads(done.stdout)['bytes_after'] / 1e9:.1f} GB after"
            if done.returncode == 0
            else done.stderr
        )
        print(
            f"{which}: {time.perf_counter() - start:.1f} s, {used:.1f} CPU s with imports; {outcome}",
            flush=True,
        )

"""On GPUs: a slice of DeepSeek-V3 as published (FP8 in blocks of 128) finalized, killed and resumed, on two ranks.

python tests/bench/gpu_fp8.py [--gb 20] [--experts 256] [--folder DIR] [--recipe intx4-weight-only:group_size=128]

The slice has DeepSeek-V3's shapes and as many layers as fit; its values are random. Once undisturbed, once killed
half-way and resumed, once under torchrun on two GPUs (where there are two, or with --ranks 2): seconds, the peak of
host memory, and whether all files are the same. Each line is printed as soon as it is known, after the seconds since
the start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tests.finalization.headers import write_headers

from loadstone.artifact.hashing import sha256_file

# Bytes of an expert, and of the embeddings and three dense layers.
EXPERT, REST = 44.1e6, 6e9
THREADS = 16
BEGAN = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:.0f} s] {text}", flush=True)


def fill(source: Path) -> None:
    """Random values in the files that `write_headers` left sparse: by several threads, on all cards."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda each: fill_file(*each), enumerate(sorted(source.glob("*.safetensors")))))
    # What follows needs the cards.
    torch.cuda.empty_cache()


def fill_file(number: int, file: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    cards = torch.cuda.device_count()
    generator = torch.Generator(f"cuda:{number % cards}" if cards else "cpu").manual_seed(number)
    tensors = {}
    with safe_open(file, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 (a safe_open handle is not a mapping)
            shape, dtype = handle.get_slice(name).get_shape(), handle.get_slice(name).get_dtype()
            values = torch.randn(shape, device=generator.device, generator=generator)
            if dtype == "F32":
                values = values.abs() * 1e-4 + 1e-5
            kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}[dtype]
            scale = {"F32": 1.0, "BF16": 0.02, "F8_E4M3": 60.0}[dtype]
            tensors[name] = (values * scale).clamp(-448, 448).to(kind).cpu()
    save_file(tensors, file, metadata={"format": "pt"})


def run(
    source: Path, out: Path, recipe: str, *options: str, ranks: int = 1, kill_after: float = 0.0
) -> tuple[float, float]:
    """Seconds and the host's peak in GB of one command; ``kill_after`` seconds it is killed."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command = [
        *start,
        "-m",
        "loadstone",
        "finalize",
        "-M",
        source,
        "-o",
        out,
        "--quantize",
        recipe,
        "--quiet",
    ]
    command += ["--layout", "compressed-tensors", "--max-shard-size", "1GB", *options]
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=sys.stderr)
    if kill_after:
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return time.perf_counter() - began, 0.0
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"exit status {status}")
    return time.perf_counter() - began, usage.ru_maxrss / 1e6


def digests(out: Path) -> dict[str, str]:
    files = sorted(out.glob("*.safetensors"))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip((file.name for file in files), pool.map(sha256_file, files), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=20)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--recipe", default="intx4-weight-only:group_size=128")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--ranks", type=int, default=min(torch.cuda.device_count(), 2))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source, once, killed, two = (folder / each for each in ("source", "once", "killed", "two"))
        layers = 3 + max(int((options.gb * 1e9 - REST) / (EXPERT * options.experts)), 1)
        write_headers(source, fp8=True, layers=layers, mtp=False, experts=options.experts)
        start, _ = run(source, folder / "none", options.recipe, "--dry-run")
        say(f"{layers} layers: imports and the plan alone (a dry run) take {start:.1f} s")
        fill(source)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        say(f"the source's {size / 1e9:.1f} GB are written")
        seconds, peak = run(source, once, options.recipe)
        say(f"undisturbed: {seconds:.1f} s, host peak {peak:.1f} GB")
        wanted = digests(once)
        decoded = json.loads((once / "loadstone.json").read_text())["source"]["decoded"]
        say(f"{len(wanted)} files; loadstone.json: decoded from {decoded}")
        shutil.rmtree(once)
        run(source, killed, options.recipe, kill_after=seconds / 2)
        say(f"killed after {seconds / 2:.1f} s; published: {killed.exists()}")
        again, _ = run(source, killed, options.recipe)
        say(f"resumed: {again:.1f} s; same files: {digests(killed) == wanted}")
        shutil.rmtree(killed)
        if options.ranks > 1:
            seconds, peak = run(source, two, options.recipe, ranks=options.ranks)
            say(f"{options.ranks} ranks: {seconds:.1f} s; same files: {digests(two) == wanted}")


if __name__ == "__main__":
    main()

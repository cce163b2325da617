"""On GPUs: a slice of DeepSeek-V3 as published (FP8 in blocks of 128) finalized, killed and resumed, on two ranks.

python tests/bench/gpu_fp8.py [--gb 20] [--experts 256] [--folder DIR] [--recipe intx4-weight-only:group_size=128]

The slice has DeepSeek-V3's shapes and as many layers as fit; its values are random. Once undisturbed, once killed
half-way and resumed, once under torchrun on two GPUs (where there are two): seconds, the peak of host memory, and
whether all files are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tests.finalization.headers import write_headers

from loadstone.artifact.hashing import sha256_file

# Bytes of an expert, and of the embeddings and three dense layers.
EXPERT, REST = 44.1e6, 6e9


def fill(source: Path) -> None:
    """Random values in the files that `write_headers` left sparse."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for file in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a safe_open handle is not a mapping)
                shape, dtype = handle.get_slice(name).get_shape(), handle.get_slice(name).get_dtype()
                values = torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu")
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
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--standalone",
        ]
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
    process = subprocess.Popen([str(part) for part in command])
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
    return {path.name: sha256_file(path) for path in sorted(out.glob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=20)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--recipe", default="intx4-weight-only:group_size=128")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        layers = 3 + max(int((options.gb * 1e9 - REST) / (EXPERT * options.experts)), 1)
        write_headers(folder / "source", fp8=True, layers=layers, mtp=False, experts=options.experts)
        fill(folder / "source")
        size = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
        seconds, peak = run(folder / "source", folder / "once", options.recipe)
        start, _ = run(folder / "source", folder / "none", options.recipe, "--dry-run")
        print(
            f"{layers} layers, {size / 1e9:.1f} GB: {seconds:.1f} s, of which imports and the plan take {start:.1f} s "
            f"(a dry run), host peak {peak:.1f} GB",
            flush=True,
        )
        wanted = digests(folder / "once")
        run(folder / "source", folder / "killed", options.recipe, kill_after=seconds / 2)
        again, _ = run(folder / "source", folder / "killed", options.recipe)
        print(
            f"killed after {seconds / 2:.1f} s, resumed in {again:.1f} s; "
            f"same files: {digests(folder / 'killed') == wanted}"
        )
        if torch.cuda.device_count() > 1:
            seconds, peak = run(folder / "source", folder / "two", options.recipe, ranks=2)
            print(f"two GPUs: {seconds:.1f} s; same files: {digests(folder / 'two') == wanted}")
        decoded = json.loads((folder / "once" / "loadstone.json").read_text())["source"]["decoded"]
        print(f"loadstone.json: decoded from {decoded}")


if __name__ == "__main__":
    main()

"""Evaluation, finalize and GPTQ on 1, 2, 4 … cards of one machine, on a checkpoint that is made on the spot.

python tests/bench/gpu_scaling.py [--sections eval,finalize,gptq,big] [--cards 1,2] [--layers 32] [--out ROWS.jsonl]

``eval``: an 8B-shaped bf16 Llama, its batches divided among whole copies, its layers divided among the cards
(``--parallel tensor``), and split by accelerate into stages. ``finalize``: the same checkpoint quantized. ``gptq``: a
few of its layers, calibrated. ``big``: a 40B-shaped model, which needs more than one card of 80 GB. Each run is a
command of its own, and its row is printed and appended to ``--out`` when it ends. ``--tiny`` tries it out on CPU
processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECTIONS = ("eval", "finalize", "gptq", "big")
SOURCE = Path(__file__).parents[2] / "src"
RECIPE = "int8-dynamic-act-int4-weight"
SHARD = 4 << 30
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "40B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8},
}  # fmt: skip
# accelerate's split into stages, which the command chooses only for a model that does not fit one card.
SPLIT = """
import json, sys, torch, loadstone
from loadstone.loading import placement
free = {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
def split(device, artifact, dtype="auto"):
    each = 1.1 * placement.weight_bytes(artifact, dtype) / len(free)
    return placement.split_map(artifact, {i: int(min(each, most)) for i, most in free.items()}, dtype)
placement.resolve_device = split
options = json.loads(sys.argv[2])
result = loadstone.evaluate(sys.argv[1], **options).as_json()
result["models"][0]["peak_memory_bytes"] = max(torch.cuda.max_memory_allocated(i) for i in free)
open(sys.argv[3], "w").write(json.dumps(result))
"""


def make(out: Path, shape: str, layers: int) -> int:
    """Write a random bf16 Llama, tensor by tensor, and a small tokenizer; returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from loadstone.artifact import TensorInfo, detect
    from loadstone.loading import load_tokenizer
    from loadstone.writing.shards import ShardWriter

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", vocab_size=16_384 if shape == "tiny" else 128_256,
        num_hidden_layers=layers, max_position_embeddings=8192, tie_word_embeddings=False, **SHAPES[shape],
    )  # fmt: skip
    with torch.device("meta"):
        tensors = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: list[list[TensorInfo]] = [[]]
    for name, size in tensors.items():
        nbytes = 2 * torch.Size(size).numel()
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + nbytes > SHARD:
            shards.append([])
        shards[-1].append(TensorInfo(name, "BF16", size, "", 0, nbytes))
    out.mkdir(parents=True)
    config.save_pretrained(out)
    load_tokenizer(detect("builtin:tiny-llama")).save_pretrained(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        writer = ShardWriter(out / name, shard, {"format": "pt"})

        def fill(tensor: TensorInfo, writer: ShardWriter = writer) -> None:
            if len(tensor.shape) == 1:
                writer.write(tensor.name, torch.ones(tensor.shape, dtype=torch.bfloat16))
                return
            values = torch.randn(tensor.shape, device=device, dtype=torch.bfloat16) * 0.02
            writer.write(tensor.name, values.cpu())

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(fill, shard))
        writer.close()
        weight_map |= dict.fromkeys((t.name for t in shard), name)
    total = sum(t.nbytes for shard in shards for t in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Table:
    """Rows, each printed and appended to a file as it comes."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        columns = ("section", "run", "cards", "seconds", "rate", "GiB/card", "loss or sha256")
        print("{:<9} {:<28} {:>5} {:>8} {:>16} {:>9}  {}".format(*columns), flush=True)

    def row(self, section: str, run: str, cards: int, seconds: float, rate: str = "", **more: Any) -> None:
        peak, result = more.get("peak_gib"), more.get("loss", more.get("sha256", more.get("error", "")))
        shown = f"{peak:.1f}" if peak is not None else ""
        line = f"{section:<9} {run:<28} {cards:>5} {seconds:>8.1f} {rate:>16} {shown:>9}  {result}"
        print(line, flush=True)
        if self._out is not None:
            entry = {"section": section, "run": run, "cards": cards, "seconds": seconds, "rate": rate, **more}
            with self._out.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def launch(cards: int, *arguments: str, limit: float) -> tuple[float, str]:
    """Run a program on that many processes: seconds, and the last line of what went wrong."""
    start = [sys.executable]
    if cards > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards)]
    environment = os.environ | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // cards)))
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [*start, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return time.perf_counter() - begin, f"longer than {limit:.0f} s"
    seconds = time.perf_counter() - begin
    if done.returncode == 0:
        return seconds, ""
    print(done.stderr[-4000:], file=sys.stderr, flush=True)
    said = [line for line in done.stderr.splitlines() if "loadstone: error:" in line]
    return seconds, (said or done.stderr.strip().splitlines() or ["no message"])[-1][-160:]


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.table = Table(options.out)
        self.text = {"data": "stories", "limit": options.documents, "context_length": options.context}

    def source(self, shape: str, layers: int) -> Path:
        out = self.folder / f"{shape}-{layers}"
        if not out.exists():
            start = time.perf_counter()
            unfinished = out.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            nbytes = make(unfinished, "tiny" if self.options.tiny else shape, layers)
            unfinished.rename(out)
            seconds = time.perf_counter() - start
            self.table.row("make", out.name, 1, seconds, f"{nbytes / 1e9 / seconds:.2f} GB/s", bytes=nbytes)
        return out

    def evaluate(self, section: str, run: str, source: Path, cards: int, *flags: str) -> None:
        """One row of eval; ``flags`` beside those of the text. ``split`` is accelerate's."""
        file = self.folder / "result.json"
        file.unlink(missing_ok=True)
        if run == "split":
            text = json.dumps(self.text | {"compile": False, "stream": False})
            seconds, error = launch(1, "-c", SPLIT, str(source), text, str(file), limit=self.options.limit)
        else:
            text_flags = [f"--{key.replace('_', '-')}={value}" for key, value in self.text.items()]
            arguments = ["-m", "loadstone", "eval", "-q", "-M", str(source), *text_flags, *flags]
            seconds, error = launch(cards, *arguments, "--json", str(file), limit=self.options.limit)
        if error:
            self.table.row(section, run, cards, seconds, error=error)
            return
        record = json.loads(file.read_text())["models"][0]
        rate = record["tokens_per_second"]
        self.table.row(
            section, run, cards, seconds, f"{rate:.0f} tokens/s",
            loss=record["loss"], peak_gib=record["peak_memory_bytes"] / 2**30, load_seconds=record["load_seconds"],
            tokens_per_second=rate, batch_size=record["batch_size"], tokens=record["tokens"],
        )  # fmt: skip

    def eval(self) -> None:
        source = self.source("8B", self.options.layers)
        for cards in self.options.cards:
            self.evaluate("eval", "copies", source, cards, "--no-compile")
            if cards > 1:
                self.evaluate(
                    "eval", f"tensor={cards}", source, cards, "--no-compile", f"--parallel=tensor={cards}"
                )
                if not self.options.tiny and cards == self.options.cards[-1]:
                    self.evaluate("eval", "split", source, cards)
            if cards > 2:
                self.evaluate("eval", "tensor=2", source, cards, "--no-compile", "--parallel=tensor=2")

    def big(self) -> None:
        source = self.source("40B", self.options.big_layers)
        self.text |= {"limit": -(-self.options.documents // 4)}
        for cards in [c for c in self.options.cards if c > 1]:
            self.evaluate("big", f"tensor={cards}", source, cards, f"--parallel=tensor={cards}")
            if not self.options.tiny:
                self.evaluate("big", "by itself", source, cards)
                if cards == self.options.cards[-1]:
                    self.evaluate("big", "split", source, cards)
        if not self.options.tiny:
            self.evaluate("big", "streamed", source, 1, "--stream")

    def finalize(self) -> None:
        self._finalize("finalize", self.source("8B", self.options.layers), "--quantize", RECIPE)

    def gptq(self) -> None:
        tokens = str(self.options.calibrate_tokens)
        source = self.source("8B", self.options.gptq_layers)
        self._finalize(
            "gptq", source, "--quantize", RECIPE, "--calibrate", "stories", "--calibrate-tokens", tokens
        )

    def _finalize(self, section: str, source: Path, *flags: str) -> None:
        nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        for cards in self.options.cards:
            out = self.folder / "finalized" / "out"
            arguments = ["-m", "loadstone", "finalize", "-q", "-M", str(source), "-o", str(out), *flags]
            seconds, error = launch(cards, *arguments, limit=self.options.limit)
            rate = f"{nbytes / 1e9 / seconds:.2f} GB/s"
            found = {"error": error} if error else {"sha256": _digest(out)}
            self.table.row(section, source.name, cards, seconds, "" if error else rate, **found)
            # With what a killed run leaves beside it.
            shutil.rmtree(out.parent, ignore_errors=True)


def _digest(directory: Path) -> str:
    """The first digits of the sha256 of all weight files."""
    whole = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--cards", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--gptq-layers", type=int, default=4)
    parser.add_argument("--big-layers", type=int, default=46)
    parser.add_argument("--documents", type=int, default=800, help="of 300 tokens")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--calibrate-tokens", type=int, default=131_072)
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, and kept")
    parser.add_argument("--out", type=Path, help="file that rows are appended to as JSON lines")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one run")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(SOURCE))
    if options.tiny:
        options.layers, options.gptq_layers, options.big_layers = 2, 2, 3
        options.documents, options.context, options.calibrate_tokens = 4, 128, 1024
    if options.cards is None:
        import torch

        count = 2 if options.tiny else torch.cuda.device_count()
        options.cards = [n for n in (1, 2, 4, 8, 16) if n <= count]
    with tempfile.TemporaryDirectory(prefix="scaling-") as temporary:
        bench = Bench(options, options.folder or Path(temporary))
        for section in options.sections:
            getattr(bench, section)()
            if section in ("finalize", "gptq") and options.folder is None and "big" in options.sections:
                # Room for the large one.
                shutil.rmtree(bench.folder / f"8B-{options.layers}", ignore_errors=True)


if __name__ == "__main__":
    main()

"""Calibration, finalize and evaluation on 1, 2, 4 … cards of one machine, on checkpoints that are made on the spot.

python tests/bench/gpu_scaling.py [--sections gptq,finalize-70B,eval,big,eval-70B] [--cards 1,2] [--folder /dev/shm/s]
    [--layers 32] [--large-layers 80] [--budget 480] [--out ROWS.jsonl]

Sections, in the order given: ``gptq``: a few layers of an 8B-shaped bf16 Llama, calibrated. ``finalize``,
``finalize-70B``: the whole 8B or 70B shape quantized. ``eval``: 8B, its batches divided among whole copies, its layers
divided among the cards (``--parallel tensor``), and split by accelerate into stages. ``big``: a 40B shape, which needs
more than one card of 80 GB. ``eval-70B``, ``gptq-70B``. Each run is a command of its own; its row is printed and
appended to ``--out`` when it ends. ``seconds`` are of the whole command, ``work`` of it without imports and the meeting
of ranks (of eval: computing alone). 40B is the first layers of 70B, by hard links. In ``--folder`` 8B takes 16 GB, 70B
141 GB and its int4 37 GB; fewer ``--large-layers`` take less. ``--tiny`` tries it out on CPU processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECTIONS = ("gptq", "finalize-70B", "eval", "big", "eval-70B", "gptq-70B", "finalize")
SOURCE = Path(__file__).parents[2] / "src"
RECIPE = "int8-dynamic-act-int4-weight"
LARGE_RECIPE = "int4-weight-only"
# Layers of a shard.
TOGETHER = {"8B": 4, "70B": 2, "tiny": 1}
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
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
    """Write a random bf16 Llama and a small tokenizer; returns its bytes. The first shard is what is outside of the
    layers."""
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
    out.mkdir(parents=True)
    config.save_pretrained(out)
    load_tokenizer(detect("builtin:tiny-llama")).save_pretrained(out)
    shards: dict[str, list[TensorInfo]] = {}
    for name, size in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        number = 1 + int(layer[1]) // TOGETHER[shape] if layer else 0
        info = TensorInfo(name, "BF16", size, "", 0, 2 * torch.Size(size).numel())
        shards.setdefault(f"model-{number:05d}.safetensors", []).append(info)
    # Repeated, from elsewhere for each tensor: drawing so many numbers takes longer than writing them. A prime, so that
    # no two rows are alike.
    random = torch.randn((1 << 18) + 3 if shape == "tiny" else (1 << 24) + 43).mul_(0.02).bfloat16()
    starts = {name: 104_729 * number % len(random) for number, name in enumerate(tensors)}

    def write(file: str) -> None:
        writer = ShardWriter(out / file, shards[file], {"format": "pt"})
        for tensor in shards[file]:
            if len(tensor.shape) == 1:
                writer.write(tensor.name, torch.ones(tensor.shape, dtype=torch.bfloat16))
                continue
            written, start = 0, starts[tensor.name]
            while written < tensor.numel:
                part = random[start : start + tensor.numel - written]
                writer.write(tensor.name, part, 2 * written)
                written, start = written + len(part), 0
        writer.close()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(write, shards))
    write_index(out, {tensor.name: file for file, found in shards.items() for tensor in found})
    return sum(tensor.nbytes for found in shards.values() for tensor in found)


def write_index(out: Path, files: dict[str, str]) -> None:
    total = sum((out / file).stat().st_size for file in set(files.values()))
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def link(whole: Path, out: Path, layers: int) -> None:
    """The first ``layers`` of a model in another directory, with the same files."""
    out.mkdir()
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
    config = json.loads((out / "config.json").read_text()) | {"num_hidden_layers": layers}
    (out / "config.json").write_text(json.dumps(config))
    files = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {
        name: file
        for name, file in files.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    for file in set(kept.values()):
        os.link(whole / file, out / file)
    write_index(out, kept)


class Table:
    """Rows, each printed and appended to a file as it comes."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        columns = ("section", "run", "cards", "seconds", "work", "rate", "GiB/card", "loss or sha256")
        print("{:<13} {:<12} {:>5} {:>8} {:>7} {:>16} {:>9}  {}".format(*columns), flush=True)

    def row(self, section: str, run: str, cards: int, seconds: float, **more: Any) -> None:
        peak, result = more.get("peak_gib"), more.get("loss", more.get("sha256", more.get("error", "")))
        work, peak = (f"{value:.1f}" if value is not None else "" for value in (more.get("work"), peak))
        line = f"{section:<13} {run:<12} {cards:>5} {seconds:>8.1f} {work:>7} {more.get('rate', ''):>16} {peak:>9}"
        print(f"{line}  {result}", flush=True)
        if self._out is not None:
            entry = {"section": section, "run": run, "cards": cards, "seconds": seconds, **more}
            with self._out.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def launch(cards: int, *arguments: str, limit: float) -> tuple[float, str, str]:
    """Run a program on that many processes: seconds, its stderr, and the last line of what went wrong."""
    if limit < 10:
        return 0.0, "", "no time is left"
    start = [sys.executable]
    if cards > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards)]
    environment = os.environ | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // cards)))
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*start, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # torchrun ends its processes.
        process.terminate()
        try:
            _, said = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, said = process.communicate()
        print(said[-3000:], file=sys.stderr, flush=True)
        return time.perf_counter() - begin, said, f"longer than {limit:.0f} s"
    seconds = time.perf_counter() - begin
    if process.returncode == 0:
        return seconds, said, ""
    print(said[-4000:], file=sys.stderr, flush=True)
    errors = [line for line in said.splitlines() if "loadstone: error:" in line]
    return seconds, said, (errors or said.strip().splitlines() or ["no message"])[-1][-160:]


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.table = Table(options.out)
        self.text = {
            "data": "stories", "limit": options.documents, "context_length": options.context,
            "batch_size": options.batch_size,
        }  # fmt: skip
        self.end = time.perf_counter() + options.budget

    @property
    def limit(self) -> float:
        """Seconds that the next run may take."""
        return min(self.options.limit, self.end - time.perf_counter())

    def source(self, shape: str, layers: int) -> Path:
        out = self.folder / f"{shape}-{layers}"
        if out.exists():
            return out
        kind = "tiny" if self.options.tiny else shape
        whole = (
            self.folder / f"{shape}-{self.options.large_layers if shape == '70B' else self.options.layers}"
        )
        if whole.exists() and layers % TOGETHER[kind] == 0:
            link(whole, out, layers)
            return out
        start = time.perf_counter()
        unfinished = out.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        nbytes = make(unfinished, kind, layers)
        unfinished.rename(out)
        seconds = time.perf_counter() - start
        self.table.row("make", out.name, 1, seconds, rate=f"{nbytes / 1e9 / seconds:.2f} GB/s", bytes=nbytes)
        return out

    def _evaluate(self, section: str, run: str, source: Path, cards: int, *flags: str) -> None:
        """One row of eval; ``flags`` beside those of the text. ``split`` is accelerate's."""
        file = self.folder / "result.json"
        file.unlink(missing_ok=True)
        if run == "split":
            text = json.dumps(self.text | {"compile": False, "stream": False})
            seconds, _, error = launch(1, "-c", SPLIT, str(source), text, str(file), limit=self.limit)
        else:
            text_flags = [f"--{key.replace('_', '-')}={value}" for key, value in self.text.items()]
            arguments = ["-m", "loadstone", "eval", "-q", "-M", str(source), *text_flags, *flags]
            seconds, _, error = launch(cards, *arguments, "--json", str(file), limit=self.limit)
        if error:
            self.table.row(section, run, cards, seconds, error=error)
            return
        record = json.loads(file.read_text())["models"][0]
        rate = record["tokens_per_second"]
        self.table.row(
            section, run, cards, seconds, work=record["tokens"] / rate, rate=f"{rate:.0f} tokens/s",
            loss=record["loss"], peak_gib=record["peak_memory_bytes"] / 2**30, load_seconds=record["load_seconds"],
            tokens_per_second=rate, batch_size=record["batch_size"], tokens=record["tokens"],
        )  # fmt: skip

    def eval(self) -> None:
        source = self.source("8B", self.options.layers)
        for cards in self.options.cards:
            self._evaluate("eval", "copies", source, cards, "--no-compile")
        most = self.options.cards[-1]
        for size in [n for n in self.options.cards if n > 1]:
            self._evaluate(
                "eval", f"tensor={size}", source, most, "--no-compile", f"--parallel=tensor={size}"
            )
        if not self.options.tiny and most > 1:
            self._evaluate("eval", "split", source, most)

    def big(self) -> None:
        self._large("big", self.source("70B", self.options.big_layers), self.options.cards)

    def eval_70b(self) -> None:
        self._large("eval-70B", self.source("70B", self.options.large_layers), self.options.cards[-1:])

    def _large(self, section: str, source: Path, cards: list[int]) -> None:
        text, self.text = self.text, self.text | {"limit": -(-self.options.documents // 4)}
        several = [n for n in reversed(cards) if n > 1]
        for number in several:
            self._evaluate(
                section, f"tensor={number}", source, number, "--no-compile", f"--parallel=tensor={number}"
            )
        if several and not self.options.tiny:
            self._evaluate(section, "by itself", source, several[-1], "--no-compile")
            self._evaluate(section, "split", source, several[0])
            self._evaluate(section, "streamed", source, 1, "--no-compile", "--stream")
        self.text = text

    def finalize(self) -> None:
        self._finalize("finalize", self.source("8B", self.options.layers), RECIPE)

    def finalize_70b(self) -> None:
        recipe = RECIPE if self.options.tiny else LARGE_RECIPE
        self._finalize("finalize-70B", self.source("70B", self.options.large_layers), recipe)

    def gptq(self) -> None:
        self._calibrate("gptq", self.source("8B", self.options.gptq_layers))

    def gptq_70b(self) -> None:
        self._calibrate("gptq-70B", self.source("70B", 2))

    def _calibrate(self, section: str, source: Path) -> None:
        tokens = str(self.options.calibrate_tokens)
        self._finalize(section, source, RECIPE, "--calibrate", "stories", "--calibrate-tokens", tokens)

    def _finalize(self, section: str, source: Path, recipe: str, *flags: str) -> None:
        nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        for cards in self.options.cards:
            out, file = self.folder / "finalized" / "out", self.folder / "result.json"
            file.unlink(missing_ok=True)
            arguments = [
                "-m",
                "loadstone",
                "finalize",
                "-v",
                "-M",
                str(source),
                "-o",
                str(out),
                "--json",
                str(file),
            ]
            seconds, said, error = launch(cards, *arguments, "--quantize", recipe, *flags, limit=self.limit)
            for line in said.splitlines():
                if re.match("loadstone: (layer |calibrat|rank 0 wrote)", line):
                    print(f"    {line.removeprefix('loadstone: ')}", flush=True)
            if error:
                self.table.row(section, source.name, cards, seconds, error=error)
            else:
                result = json.loads(file.read_text())
                calibrated = re.search(r"calibrated: .* in all ([\d.]+) s", said)
                work = result["seconds"] + (float(calibrated[1]) if calibrated else 0)
                digests = [
                    f"{n} {d}" for n, d in sorted(result["files"].items()) if n.endswith(".safetensors")
                ]
                self.table.row(
                    section, source.name, cards, seconds, work=work, rate=f"{nbytes / 1e9 / work:.2f} GB/s",
                    sha256=hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16],
                    write_seconds=result["seconds"],
                )  # fmt: skip
            # With what a killed run leaves beside it.
            shutil.rmtree(out.parent, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--cards", type=lambda text: sorted(int(n) for n in text.split(",")))
    parser.add_argument("--layers", type=int, default=32, help="of 8B")
    parser.add_argument("--gptq-layers", type=int, default=4)
    parser.add_argument("--large-layers", type=int, default=80, help="of 70B")
    parser.add_argument("--big-layers", type=int, default=46, help="of 40B")
    parser.add_argument("--documents", type=int, default=1800, help="of 300 tokens")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="windows; four copies have four batches each of 1,800 documents",
    )
    parser.add_argument("--calibrate-tokens", type=int, default=65_536)
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, and kept")
    parser.add_argument("--out", type=Path, help="file that rows are appended to as JSON lines")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one run")
    parser.add_argument(
        "--budget", type=float, default=1e9, help="seconds for all; runs after them are left out"
    )
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(SOURCE))
    if options.tiny:
        options.layers, options.gptq_layers, options.big_layers, options.large_layers = 3, 2, 2, 3
        options.documents, options.context, options.calibrate_tokens = 4, 128, 1024
    if options.cards is None:
        import torch

        count = 2 if options.tiny else torch.cuda.device_count()
        options.cards = [n for n in (1, 2, 4, 8, 16) if n <= count]
    with tempfile.TemporaryDirectory(prefix="scaling-") as temporary:
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, options.folder or Path(temporary))
        for section in options.sections:
            getattr(bench, section.lower().replace("-", "_"))()


if __name__ == "__main__":
    main()

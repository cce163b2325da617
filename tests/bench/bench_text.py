"""Memory and speed of an evaluation over long texts, and memory of `--kl` over contexts and vocabularies, on a CPU.

python -m tests.bench text [--parts tokens,kl] [--mb 10,100,1000] [--model DIR]

``tokens``: a file of JSON lines of each size, tokenized by all that an evaluation does before and after the model: the
text is read and tokenized, windows are made, values of all tokens are summed over what is resampled. Beside it
`datasets.map` with the same tokenizer and a process for each core. Memory is the peak resident set above what was
resident after imports: of the process, and of its largest child. ``kl``: a tiny Llama beside another one, over
16,384 tokens; memory is the peak of the whole process. Each run has a process of its own, and no cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import SMOLLM2

from loadstone.artifact.builtin import builtin_path
from loadstone.text.corpus import read_corpus

CONTEXTS, VOCABULARIES = (512, 2048, 8192), (32_768, 262_144)
_KL_TOKENS = 16_384

CHILD = """
import json, logging, os, resource, sys, time
logging.disable(logging.WARNING)
from pathlib import Path
who, model, text, folder = sys.argv[1:]
import datasets, numpy as np, torch, transformers
from transformers import AutoTokenizer
from loadstone.evaluation.models import plan_models
from loadstone.evaluation.options import Options
from loadstone.evaluation.task import make_task
datasets.disable_progress_bars()

def loadstone(text, name):
    options = Options((model,), data=text, cache=f"{folder}/{name}", device="cpu")
    task = make_task(options, plan_models(options, "cpu"))
    values = np.ones(task.stream.count, dtype=np.float32)
    task.units.sums(values)
    return task.stream.count

def datasets_map(text, name):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = datasets.load_dataset("json", data_files=text, split="train", cache_dir=f"{folder}/{name}")
    encode = lambda batch: tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
    cores = len(os.sched_getaffinity(0))
    found = rows.map(encode, batched=True, num_proc=cores, remove_columns=rows.column_names)
    return sum(pairs.num_rows and len(pairs["input_ids"].combine_chunks().flatten())
               for pairs in found.with_format("arrow").iter(1000))

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

Path("/proc/self/clear_refs").write_text("5")
base, start, used = status("VmRSS"), time.perf_counter(), os.times()
tokens = globals()[who](text, "run")
seconds, after = time.perf_counter() - start, os.times()
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
cpu = sum(after[:4]) - sum(used[:4])
print("RESULT " + json.dumps([tokens, seconds, cpu, (status("VmHWM") - base) / 2**20, child]))
"""

EVAL = """
import json, logging, sys
logging.disable(logging.WARNING)
import loadstone
model, other, text, context, kl = sys.argv[1:]
found = loadstone.evaluate(
    model, baseline=other, data=text, context_length=int(context), kl=kl == "True", device="cpu"
)
print("RESULT " + json.dumps(max(record["peak_memory_bytes"] for record in found.records) / 2**20))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="tokens,kl")
    parser.add_argument("--mb", default="10,100,1000")
    parser.add_argument(
        "--model", type=Path, default=SMOLLM2 if SMOLLM2.exists() else builtin_path("builtin:tiny-llama")
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "tokens" in options.parts:
            tokens(Path(folder), options.model, [int(size) for size in options.mb.split(",")])
        if "kl" in options.parts:
            divergence(Path(folder))


def tokens(folder: Path, model: Path, sizes: list[int]) -> None:
    """The table of both sides over texts of ``sizes`` MB."""
    print("| text | side | tokens | seconds | MB/s | CPU s | MiB | largest child, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for size in sizes:
        text = folder / f"{size}.jsonl"
        with text.open("w") as file:
            file.writelines(json.dumps({"text": part}) + "\n" for part in parts(size * 10**6))
        for who in ("loadstone", "datasets_map"):
            with tempfile.TemporaryDirectory(dir=folder) as own:
                count, seconds, cpu, peak, child = child_of(CHILD, who, model, text, own)
            row = (f"{size} MB", who, f"{count:,}", f"{seconds:.1f}", f"{size / seconds:.1f}", f"{cpu:.1f}")
            print("|", " | ".join((*row, f"{peak:.0f}", f"{child:.0f}")), "|", flush=True)
        text.unlink()


def parts(size: int) -> Iterator[str]:
    """Documents of ``size`` bytes in all: paragraphs of `austen` in a seeded order that never repeats a document."""
    paragraphs = [p for document in read_corpus("austen").documents for p in document.split("\n\n") if p]
    chosen = random.Random(0)
    while size > 0:
        document = "\n\n".join(chosen.choices(paragraphs, k=8))
        size -= len(document.encode())
        yield document


def divergence(folder: Path) -> None:
    """The table of the peak memory of an evaluation without and with ``--kl``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    source = builtin_path("builtin:tiny-llama")
    ids = AutoTokenizer.from_pretrained(source)(
        "\n\n".join(read_corpus("austen").documents), verbose=False
    ).input_ids
    text = folder / "kl.txt"
    text.write_text(AutoTokenizer.from_pretrained(source).decode(ids[:_KL_TOKENS]))
    print("| vocabulary | context | without, MiB | with `--kl`, MiB |\n|---|---|---|---|", flush=True)
    for vocabulary in VOCABULARIES:
        models = []
        for seed in (0, 1):
            config = LlamaConfig(
                vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                num_attention_heads=4, max_position_embeddings=max(CONTEXTS), tie_word_embeddings=True,
            )  # fmt: skip
            torch.manual_seed(seed)
            models.append(folder / f"{vocabulary}-{seed}")
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(models[-1])
            AutoTokenizer.from_pretrained(source).save_pretrained(models[-1])
        for context in CONTEXTS:
            peaks = [child_of(EVAL, *models, text, context, kl) for kl in (False, True)]
            print(f"| {vocabulary:,} | {context:,} | {peaks[0]:.0f} | {peaks[1]:.0f} |", flush=True)


def child_of(code: str, *arguments: Any) -> Any:
    """What a child process prints after RESULT."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        sys.exit(done.stderr[-2000:])
    return json.loads(line.removeprefix("RESULT "))


if __name__ == "__main__":
    main()

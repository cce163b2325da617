"""On a GPU: export of a live model of which most is offloaded under a 500 MiB GPU limit, and `--device cuda` folding.

A Qwen3-0.6B-shaped random model (28 layers of 1024, vocabulary 151,936, tied). Prints one table: what, seconds, peak
GPU MiB, peak anonymous host MiB above the base, parameters on meta.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from loadstone import export_fakequant

CONFIG = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measured(work: Callable[[], Any]) -> tuple[float, float, float]:
    """Seconds, peak GPU MiB, peak host MiB above the base."""
    base, peak, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    torch.cuda.reset_peak_memory_stats()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return seconds, torch.cuda.max_memory_allocated() / 2**20, (peak[0] - base) / 2**20


def weights_hash(directory: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(directory.glob("model*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def main() -> None:
    print("| what | format | s | GPU MiB | host MiB | on meta | weights |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="loadstone-gpu-") as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = transformers.Qwen3Config(**CONFIG)
        with torch.device("cuda"):
            model = transformers.Qwen3ForCausalLM(config).bfloat16()
        model.cpu().save_pretrained(folder / "model")
        del model
        torch.cuda.empty_cache()
        for form in ("nvfp4", "fp8"):
            for device in ("cpu", "cuda"):
                out = folder / f"directory-{form}-{device}"
                export(folder / "model", out, form, f"directory, --device {device}", device=device)
            live(folder, form)


def live(folder: Path, form: str) -> None:
    """A model of which accelerate keeps all but 500 MiB off the GPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map="auto", max_memory={0: "500MiB", "cpu": "32GiB"}
    )
    parameters = list(model.parameters())
    meta = f"{sum(p.device.type == 'meta' for p in parameters)}/{len(parameters)}"
    ids = torch.arange(3, 35, device="cuda")[None]
    with torch.no_grad():
        before = model(ids).logits
    export(model, folder / f"live-{form}", form, "live, 500 MiB GPU limit", meta)
    with torch.no_grad():
        same = torch.equal(model(ids).logits, before)
    print(f"| live model computes as before: {same} | | | | | | |", flush=True)


def export(source: Any, out: Path, form: str, what: str, meta: str = "", **options: Any) -> None:
    seconds, gpu, host = measured(lambda: export_fakequant(source, out, format=form, **options))
    print(
        f"| {what} | {form} | {seconds:.1f} | {gpu:.0f} | {host:+.0f} | {meta} | {weights_hash(out)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

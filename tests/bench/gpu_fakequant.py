"""On a GPU: export of a live model of which most is offloaded under a 500 MiB GPU limit, and `--device cuda` folding.

A Qwen3-0.6B-shaped random model (28 layers of 1024, vocabulary 151,936, tied). Prints one table: what, seconds, peak
MiB of the GPU and of anonymous host memory above what was held before, parameters on meta, and a hash of the weights.
"""

from __future__ import annotations

import gc
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
    """Bytes of anonymous memory; of all resident memory where the kernel does not tell them apart."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {
        line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))
    }
    return int(sizes.get("RssAnon", sizes.get("VmRSS", "0"))) * 1024


def measured(work: Callable[[], Any]) -> tuple[float, float, float]:
    """Seconds, and peak MiB above what was held before: of the GPU, and of the host."""
    gc.collect()
    base, peak, stop = anonymous(), [0], threading.Event()
    held = torch.cuda.memory_allocated()

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
    return seconds, (torch.cuda.max_memory_allocated() - held) / 2**20, (peak[0] - base) / 2**20


def weights_hash(directory: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(directory.glob("model*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def main() -> None:
    print("| export | format | s | GPU MiB | host MiB | on meta | weights |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="loadstone-gpu-") as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = transformers.Qwen3Config(**CONFIG)
        with torch.device("cuda"):
            model = transformers.Qwen3ForCausalLM(config).bfloat16()
        model.cpu().save_pretrained(folder / "model")
        del model
        torch.cuda.empty_cache()
        # Kernels are loaded on first use: not part of a time.
        export_fakequant(_small(folder), folder / "first", format="nvfp4")
        for form in ("fp8", "nvfp4"):
            for device in ("cuda", "cpu"):
                out = folder / f"directory-{form}-{device}"
                export(folder / "model", out, form, f"directory, --device {device}", device=device)
            live(folder, form)


def _small(folder: Path) -> Path:
    config = transformers.Qwen3Config(**CONFIG | {"num_hidden_layers": 1, "vocab_size": 256})
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder / "small")
    return folder / "small"


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
    print(f"| the live model computes as before: {same} | {form} | | | | | |", flush=True)


def export(source: Any, out: Path, form: str, what: str, meta: str = "", **options: Any) -> None:
    seconds, gpu, host = measured(lambda: export_fakequant(source, out, format=form, **options))
    print(
        f"| {what} | {form} | {seconds:.1f} | {gpu:+.0f} | {host:+.0f} | {meta} | {weights_hash(out)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""Decode on a CPU: a token of one sequence, by recipe, as torchao computes it and by `load(…, fast=True)`.

python -m tests.bench decode [--recipes a,b] [--rows 1] [--tokens 8] [--runs 5] [--threads 1]

SmolLM2 and a Llama of 1B's shapes with three layers, all in bfloat16. All models of a shape write in turn in one
process, after a prompt of 64 tokens; CPU milliseconds a token, medians, and the speed as a share of bfloat16's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.bench_load import quantize
from tests.conftest import SMOLLM2

RECIPES = (
    "int8-weight-only",
    "int8-dynamic-act-int8-weight",
    "int8-dynamic-act-int4-weight",
    "int8-dynamic-act-intx-weight",
    "intx4-weight-only",
    "intx2-weight-only",
    "float8-weight-only",
    "nvfp4-weight-only",
    "mxfp8-dynamic-act-mxfp8-weight",
    "mxfp4-dynamic-act-mxfp4-weight",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import loadstone

    torch.set_num_threads(options.threads)
    print(
        "| shape | recipe | bf16 ms | torchao ms | of bf16 | fast ms | of bf16 |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large"
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=3,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(large)
        for shape, source in (("SmolLM2", SMOLLM2), ("1B, 3 layers", large)):
            plain = loadstone.load(source, device="cpu")
            for recipe in options.recipes.split(","):
                path = quantize(source, recipe, Path(folder) / f"{source.name}-{recipe}")
                models = [plain, *(loadstone.load(path, device="cpu", fast=fast) for fast in (False, True))]
                runs = [
                    [token_ms(m, options.rows, options.tokens) for m in models] for _ in range(options.runs)
                ]
                bf16, torchao, fast = (statistics.median(each) for each in zip(*runs, strict=True))
                print(
                    f"| {shape} | {recipe} | {bf16:.1f} | {torchao:.1f} | {bf16 / torchao:.2f} | {fast:.1f} | "
                    f"{bf16 / fast:.2f} |",
                    flush=True,
                )


def token_ms(model: Any, rows: int, tokens: int) -> float:
    """CPU milliseconds of one token of ``rows`` sequences."""
    import torch

    with torch.inference_mode():
        out = model(torch.arange(100, 164).expand(rows, -1), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        start = time.process_time()
        for _ in range(tokens):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return (time.process_time() - start) / tokens * 1e3


if __name__ == "__main__":
    main()

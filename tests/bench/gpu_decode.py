"""On a GPU: tokens per second of one sequence with weight-only recipes, beside bf16; and the kernels alone.

    python tests/bench/gpu_decode.py [--kernels] [--layers 16] [--recipes a,b] [--profile] [--no-stock]

``--kernels``: products of one row with single weights, each replayed in a CUDA graph: microseconds and the share of
cuBLAS's bf16 time, for the block sizes that were tried. Otherwise a random model of Llama-3-8B's shapes with 16 layers
is made on the GPU and quantized there by each recipe, and `generate` writes with a static cache: stock modules and
loop, which compile the model; our loop (`loadstone.greedy_decoding`); and our loop with the modules of
``loadstone.load(…, fast=True)``. Tokens per second, in brackets over bf16's stock, are the median of three differences
between writing 64 and 128 tokens; the warm-up is the first call. ``--profile`` adds the kernels that a token of the
last way spends its time in; ``--no-stock`` leaves the stock loop out for recipes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

RECIPES = ("int4-weight-only", "float8-weight-only", "int8-weight-only", "intx4-weight-only")
WAYS = STOCK, OURS, FAST = "stock", "our loop", "our loop, fast"
# Rows of a block, values of a block, warps.
BYTES = (
    (1, 2048, 4),
    (2, 1024, 4),
    (2, 2048, 4),
    (4, 512, 2),
    (4, 1024, 4),
    (4, 2048, 8),
    (8, 512, 4),
    (8, 1024, 8),
)
NIBBLES = (
    (1, 4096, 2),
    (2, 4096, 2),
    (2, 4096, 4),
    (4, 2048, 2),
    (4, 4096, 2),
    (4, 4096, 4),
    (8, 2048, 4),
    (8, 4096, 4),
)
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096))


def kernels() -> None:
    import torch
    import triton
    from torch.nn import functional as F

    from loadstone.loading import few_rows_kernel as kernel
    from loadstone.loading.few_rows import pack_nibbles

    for outputs, inputs in SHAPES:
        # More copies than the L2 cache holds, so that weights come from memory as in a model.
        copies = max(2, (200 << 20) // (outputs * inputs))
        x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16)
        dense = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        scale = torch.rand(outputs, device="cuda")
        scales = torch.rand(outputs, inputs // 128, device="cuda", dtype=torch.bfloat16)
        integers = [(w * 20).to(torch.int8) for w in dense]
        floats = [w.to(torch.float8_e4m3fn) for w in dense]
        words = [pack_nibbles(w.clamp(-8, 7).to(torch.int8), 128) for w in dense]

        def timed(product: Any, weights: list[Any], *rest: Any, x: Any = x) -> float:
            calls = partial(lambda: [product(x, w, *rest) for w in weights])
            return float(triton.testing.do_bench_cudagraph(calls, rep=20)) * 1000 / len(weights)

        base = timed(F.linear, dense)
        print(
            f"{outputs} x {inputs}: bf16 {base:.1f} us, {outputs * inputs * 2 / base / 1e6:.2f} TB/s",
            flush=True,
        )
        for name, product, arguments, options, configs in (
            ("int8", kernel.bytes_product, (integers, scale), ("_BYTES", "_TALL"), BYTES),
            ("fp8", kernel.bytes_product, (floats, scale), ("_BYTES", "_TALL"), BYTES),
            ("int4", kernel.nibbles_product, (words, scales, scales), ("_NIBBLES",), NIBBLES),
        ):
            rows = []
            for config in configs:
                for option in options:
                    setattr(kernel, option, config)
                rows.append((timed(product, *arguments), config))
            rows.sort()
            print(
                f"  {name}: " + ", ".join(f"{c} {t:.1f} us {base / t:.2f}x" for t, c in rows[:5]), flush=True
            )


def rate(model: Any, ids: Any, **options: Any) -> tuple[float, float]:
    """Tokens per second of greedy decoding with a static cache, and seconds of the first call."""
    import torch

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            **options,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    warm = seconds(128)
    seconds(64)
    return statistics.median(64 / (seconds(128) - seconds(64)) for _ in range(3)), warm


def profile(model: Any, ids: Any) -> None:
    """Microseconds a token of each kernel, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity

    import loadstone

    tokens = 64
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        rate_options = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": "static"}
        model.generate(ids, custom_generate=loadstone.greedy_decoding, **rate_options)
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda k: -k.self_device_time_total)
    total = sum(k.self_device_time_total for k in kernels)
    print(f"  a token's kernels: {total / tokens:.0f} us in {sum(k.count for k in kernels) / tokens:.0f}")
    for kernel in kernels[:14]:
        time_, count = kernel.self_device_time_total / tokens, kernel.count / tokens
        print(f"  {time_:8.1f} us {count:6.1f} of {time_ / count:5.1f} us  {kernel.key[:90]}", flush=True)


def make_model(layers: int, recipe: str) -> Any:
    """A random model on the GPU, quantized by ``recipe`` ("": bf16)."""
    import torch
    from tests.bench.gpu_eval import quantize
    from tests.bench.gpu_scaling import SHAPES
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256, num_hidden_layers=layers, max_position_embeddings=8192, tie_word_embeddings=False,
        dtype="bfloat16", **SHAPES["8B"],
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    if recipe:
        quantize(model, recipe)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--stock", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if options.kernels:
        kernels()
        return
    import torch
    import transformers

    import loadstone
    from loadstone.loading.few_rows import speed_up_decoding

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}",
        flush=True,
    )
    ids = torch.randint(0, 1000, (1, 32), device="cuda")
    base: dict[str, float] = {}
    print(f"| recipe | {' | '.join(WAYS)} | over bf16 in our loop | first logits agree to | warm-ups, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for recipe in ("", *options.recipes.split(",")):
        model = make_model(options.layers, recipe)
        logits, found, warm = [], {}, []
        for way in WAYS:
            if (way == STOCK and recipe and not options.stock) or (way == FAST and not recipe):
                continue
            torch.compiler.reset()
            if way == FAST:
                speed_up_decoding(model)
            with torch.no_grad():
                logits.append(model(ids[:, :1]).logits.float())
            loop = {} if way == STOCK else {"custom_generate": loadstone.greedy_decoding}
            found[way], seconds = rate(model, ids, **loop)
            warm.append(f"{seconds:.0f}")
            if options.profile and way == (FAST if recipe else OURS):
                profile(model, ids)
        base = base or found
        gap = (logits[0] - logits[-1]).abs().max().item() / logits[0].abs().max().item()
        rates = [f"{found[w]:.0f} ({found[w] / base[STOCK]:.2f}x)" if w in found else "" for w in WAYS]
        best = max(tokens for way, tokens in found.items() if way != STOCK)
        print(
            f"| {recipe or 'bf16'} | {' | '.join(rates)} | {best / base[OURS]:.2f} | {gap:.1e} | {', '.join(warm)} |",
            flush=True,
        )
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""Tokens per second of an evaluation on one GPU: stock loops beside ours, for bf16 and every recipe.

    python tests/bench/gpu_eval.py [--layers 22] [--batch 8] [--context 2048] [--recipes a,b] [--loops a,b]
    [--whole-compile a,b]

The model is a random Llama of TinyLlama's shape (1.1 billion parameters): speed does not depend on what the
weights say. Stock: the model's own forward with full logits and cross entropy, eager and (for the recipes
of --whole-compile, last, for it takes minutes) compiled as a whole. Ours: fast path, chunked head, and with
--compile one graph for all layers. Each figure is the median of nine batches (of two when they are slow), after a
second of others: a card that has idled is faster at first.
"of peak": bf16 matrix peak of the card, whatever the recipe multiplies in.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# Dense bf16 peak of the matrix units, FLOP/s, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
RUNS, SLOW_SECONDS, HOT_SECONDS = 9, 4.0, 1.0
LOOPS = ("stock", "ours", "ours --compile")


def make_model(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def quantize(model: Any, recipe: str) -> None:
    from torchao.quantization import quantize_

    from loadstone.quantization import parse_recipe, to_torchao

    quantize_(model.model, to_torchao(parse_recipe(recipe).scheme))


def stock(model: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def loop(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return loop


def ours(model: Any, *, compiled: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    from loadstone.evaluation.fast.replace import speed_up
    from loadstone.evaluation.scoring.compiling import compile_layers
    from loadstone.evaluation.scoring.head import chunk_rows, split_head
    from loadstone.evaluation.scoring.losses import Batch, batch_losses

    speed_up(model)
    if compiled:
        compile_layers(model)
    split, rows = split_head(model), chunk_rows(model, torch.device("cuda"))

    def loop(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        every = torch.arange(ids.numel(), device="cuda")
        return batch_losses(split, Batch(ids, every, targets.flatten(), every), rows).mean()

    return loop


def measure(
    make: Callable[[], Callable[..., torch.Tensor]], batch: int, context: int
) -> tuple[float, float, float, float]:
    """Tokens per second, seconds of warm-up, loss, and peak GiB."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32000, (batch, context), generator=generator).cuda()
    targets = ids.roll(-1, 1)
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    loop = make()
    with torch.inference_mode():
        loss = loop(ids, targets).item()
        loop(ids, targets)
        torch.cuda.synchronize()
        warm = time.perf_counter() - begin
        begin = time.perf_counter()
        while time.perf_counter() - begin < HOT_SECONDS:
            loop(ids, targets).item()
        times: list[float] = []
        while len(times) < RUNS and (len(times) < 2 or sum(times) < SLOW_SECONDS):
            begin = time.perf_counter()
            loop(ids, targets)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    return batch * context / statistics.median(times), warm, loss, torch.cuda.max_memory_allocated() / 2**30


def flops_per_token(model: Any, context: int) -> float:
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    config = model.config
    # Causal attention: two products over half of the context on average.
    return 2.0 * matrices + 2.0 * config.num_hidden_layers * context * config.hidden_size


def main() -> None:
    from loadstone.quantization import RECIPES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--loops", default=",".join(LOOPS))
    parser.add_argument("--whole-compile", default="bf16,int8-dynamic-act-int4-weight")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    probe = make_model(args.layers)
    work = flops_per_token(probe, args.context)
    del probe
    print(f"{name}, torch {torch.__version__}; {args.batch}x{args.context}, {work / 1e9:.2f} GFLOP a token")
    columns = f"{'tokens/s':>10}{'of peak':>9}{'warm-up s':>11}{'loss':>10}{'GiB':>7}"
    print(f"{'model':<34}{'loop':<16}{columns}")
    recipes = ["bf16", *(r for r in args.recipes.split(",") if r not in ("", "bf16"))]
    whole = [r for r in args.whole_compile.split(",") if r]
    for recipe, loop in [
        *((r, loop) for r in recipes for loop in args.loops.split(",")),
        *((r, "stock compiled") for r in whole),
    ]:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        try:
            speed, warm, loss, gib = measure_one(recipe, loop, args)
        except Exception as error:
            reason = " ".join(str(error).split())[:90]
            print(f"{recipe:<34}{loop:<16} does not run here: {reason}", flush=True)
            continue
        share = f"{100 * speed * work / peak:.0f} %" if peak else ""
        print(
            f"{recipe:<34}{loop:<16}{speed:>10.0f}{share:>9}{warm:>11.1f}{loss:>10.5f}{gib:>7.1f}", flush=True
        )


def measure_one(recipe: str, loop: str, args: argparse.Namespace) -> tuple[float, float, float, float]:
    model = make_model(args.layers)
    if recipe != "bf16":
        quantize(model, recipe)
    if loop == "stock compiled":
        # As a user would; torchao's recipes turn inductor's exhaustive tuning on, minutes for nothing.
        model.compile(options={"coordinate_descent_tuning": False})
    make = {
        "ours": lambda: ours(model, compiled=False),
        "ours --compile": lambda: ours(model, compiled=True),
    }.get(loop, lambda: stock(model))
    return measure(make, args.batch, args.context)


if __name__ == "__main__":
    main()

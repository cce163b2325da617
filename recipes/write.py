"""Let models write, and time them: tokens per second of loadstone's load (fast path on) beside stock transformers.

    python recipes/write.py -M builtin:tiny-llama -M tiny-w4 --prompt "Once upon a time" --tokens 200

All models, both sides of each, run the same `generate` on the same prompt, one sequence, in turns: medians. On a GPU
``--static`` lets transformers compile the step over a static KV cache, into one CUDA graph (minutes of warm-up).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import loadstone
from loadstone.evaluation.fast.replace import speed_up
from loadstone.loading import load_tokenizer

# Runs before the measured ones: the second call of a compiled step is the one that records its CUDA graph.
WARM = 2
# Runs a second: what is slower is measured once.
SLOW = 0.2


def main() -> None:
    options = parse()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # One function compiled for each of many models.
    torch._dynamo.config.recompile_limit = 8 * len(options.model)
    found: list[dict[str, Any]] = []
    # All models are held at once and timed in turns: on a busy machine, figures of other moments do not compare.
    turns: list[tuple[dict[str, Any], str, Any, Any]] = []
    for name in options.model:
        tokenizer = load_tokenizer(name)
        ours = loadstone.load(name, device=device, dtype=options.dtype)
        speed_up(ours)
        record: dict[str, Any] = {"model": str(name), "dtype": str(ours.dtype).removeprefix("torch.")}
        record["text"] = sample(ours, tokenizer, options)
        found.append(record)
        turns.append((record, "ours", ours, tokenizer))
        try:
            path = loadstone.detect(name).path
            stock = AutoModelForCausalLM.from_pretrained(path, device_map=device, dtype="auto")
            turns.append((record, "stock", stock, tokenizer))
        except Exception as error:  # stock transformers fails in many ways; the table says so
            print(f"stock transformers cannot load {name}: {type(error).__name__}: {error}")
    rates: list[list[float]] = [[] for _ in turns]
    for run in range(-WARM, options.runs):
        for measured, (_, _, model, tokenizer) in zip(rates, turns, strict=True):
            if run > 0 and measured[0] < SLOW * options.tokens:
                continue
            rate = speed(model, tokenizer, options)
            if run >= 0:
                measured.append(rate)
    for measured, (record, side, *_) in zip(rates, turns, strict=True):
        record[f"{side}_tokens_per_second"] = statistics.median(measured)
    base = found[0]["ours_tokens_per_second"]
    print(f"\n| model | computed in | ours, tokens/s | stock, tokens/s | ours against {found[0]['model']} |")
    print("|---|---|---|---|---|")
    for r in found:
        stock = r.get("stock_tokens_per_second")
        rate = r["ours_tokens_per_second"]
        print(
            f"| {r['model']} | {r['dtype']} | {rate:.0f} | {f'{stock:.0f}' if stock else '-'} | {rate / base:.2f} |"
        )
    for r in found:
        print(f"\n--- {r['model']}\n{r['text']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def sample(model: Any, tokenizer: Any, options: argparse.Namespace) -> str:
    """A story by seeded sampling."""
    torch.manual_seed(options.seed)
    ids = encode(tokenizer, options.prompt, model.device)
    with torch.inference_mode():
        out = model.generate(
            ids, max_new_tokens=options.tokens, do_sample=True, temperature=0.7, top_k=40, pad_token_id=0
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def speed(model: Any, tokenizer: Any, options: argparse.Namespace) -> float:
    """Tokens a second of greedy decoding, the prompt's prefill included."""
    ids = encode(tokenizer, options.prompt, model.device)
    begin = now(model.device)
    with torch.inference_mode():
        out = model.generate(
            ids,
            max_new_tokens=options.tokens,
            min_new_tokens=options.tokens,
            do_sample=False,
            pad_token_id=0,
            **({"cache_implementation": "static"} if options.static else {}),
        )
    return (out.shape[1] - ids.shape[1]) / (now(model.device) - begin)


def encode(tokenizer: Any, prompt: str, device: torch.device) -> torch.Tensor:
    """A story's start: token ids (1, length) on the device."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return torch.tensor([start + tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=device)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-M", "--model", action="append", required=True, help="repeat; the first is the measure"
    )
    parser.add_argument("--prompt", default="Once upon a time, there was a little rabbit named Lily.")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--static", action="store_true", help="a static KV cache; compiled on a GPU")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

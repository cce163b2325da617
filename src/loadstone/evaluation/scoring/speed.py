"""``--speed``: prefill and decode speed of a model, for one sequence and for a full batch."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from loadstone.evaluation.measure import peak_bytes, reset_peak
from loadstone.loading.positions import positions

PROMPT_TOKENS, _WRITTEN, _RUNS = 512, 16, 3


def measure_speed(
    model: Any, ids: torch.Tensor, batch_sizes: tuple[int, ...], *, compiled: bool = False
) -> list[dict[str, Any]]:
    """Prefill and decode speed on prompts cut from ``ids`` (tokens,), one record per batch size: tokens per
    second of all sequences together, seconds to the first token (median of three), peak memory in bytes.

    ``compiled``: as `generate` writes with a static cache and `greedy_decoding`, on a GPU one replay a token.
    """
    limit = positions(model.config).limit or PROMPT_TOKENS + _WRITTEN
    length = max(1, min(PROMPT_TOKENS, limit - _WRITTEN, len(ids)))
    prompt = ids[:length]
    prompts = [prompt.expand(size, length).contiguous() for size in sorted(set(batch_sizes))]
    return [_measure(model, each, compiled) for each in prompts]


def _measure(model: Any, prompt: torch.Tensor, compiled: bool) -> dict[str, Any]:
    device = prompt.device
    reset_peak(device)
    firsts, rates = [], []
    # The first run is a warm-up.
    for _ in range(_RUNS + 1):
        first, rate = (_generate_compiled if compiled else _generate)(model, prompt)
        firsts.append(first)
        rates.append(rate)
    first = statistics.median(firsts[1:])
    return {
        "batch_size": len(prompt),
        "prompt_tokens": prompt.shape[1],
        "compiled": compiled,
        "prefill_tokens_per_second": prompt.numel() / first,
        "first_token_seconds": first,
        "decode_tokens_per_second": statistics.median(rates[1:]),
        "peak_memory_bytes": peak_bytes(device),
    }


def _generate(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it, of greedy decoding with a cache."""
    with torch.no_grad():
        begin = _now(prompt.device)
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = _now(prompt.device)
        for _ in range(_WRITTEN):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        end = _now(prompt.device)
    return first - begin, len(prompt) * _WRITTEN / (end - first)


def _generate_compiled(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """The same by `generate` with a static cache and `greedy_decoding`."""
    from loadstone.loading.greedy import greedy_decoding

    def seconds(tokens: int) -> float:
        begin = _now(prompt.device)
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            custom_generate=greedy_decoding,
        )
        return _now(prompt.device) - begin

    # The longest first: the memory and graph of it serve the other, too.
    several, first = seconds(_WRITTEN), seconds(1)
    return first, len(prompt) * (_WRITTEN - 1) / (several - first)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""How many windows to compute at once."""

from __future__ import annotations

from typing import Any

import torch

from loadstone.evaluation.scoring.compiling import eagerly
from loadstone.evaluation.scoring.head import chunk_rows, split_head
from loadstone.evaluation.scoring.losses import BatchMaker, batch_losses, plan_batches

# Tokens per batch that saturate the device; more only costs memory.
_ENOUGH_TOKENS = {"cpu": 2048, "cuda": 65536}
_HEADROOM = 0.85


def choose_batch_size(
    model: Any, maker: BatchMaker, context_length: int, models: int = 1, *, measure: bool = True
) -> int:
    """Choose the windows per batch that keep the device busy and fit its memory, which ``models`` models share.

    On a GPU the memory of one and of two windows is measured and the largest size that fits is worked out,
    so that memory never runs out: growing until it does would leave it fragmented.
    """
    enough = max(1, _ENOUGH_TOKENS.get(maker.device.type, _ENOUGH_TOKENS["cuda"]) // context_length)
    if maker.device.type != "cuda" or enough == 1 or not measure:
        return enough
    one, two = (_peak(model, maker, size) for size in (1, 2))
    free, _ = torch.cuda.mem_get_info(maker.device)
    # Memory in torch's cache is free as well.
    free += torch.cuda.memory_reserved(maker.device) - torch.cuda.memory_allocated(maker.device)
    per_window = max(two - one, 1) * models
    fitting = int((free * _HEADROOM - models * max(one - per_window, 0)) // per_window)
    return max(1, min(enough, fitting))


def _peak(model: Any, maker: BatchMaker, windows: int) -> int:
    """Bytes that scoring a batch of this many windows (the longest) takes on top of the model."""
    members = plan_batches(maker.windows, windows)[0]
    before = torch.cuda.memory_allocated(maker.device)
    torch.cuda.reset_peak_memory_stats(maker.device)
    with torch.no_grad(), eagerly(model):
        batch_losses(split_head(model), maker(members), chunk_rows(model, maker.device))
    peak = torch.cuda.max_memory_allocated(maker.device) - before
    return peak

"""Values of an evaluation across the processes of a ``torchrun`` or ``accelerate launch`` job: the same batches,
divided, give the same numbers."""

from __future__ import annotations

import numpy as np

from loadstone.evaluation.scoring.losses import Timing, Values
from loadstone.ranks import Ranks


def device_of(ranks: Ranks, asked: str) -> str:
    """The device for this process: one GPU each, if GPUs were asked for and are there."""
    import torch

    if ranks.alone or asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked
    return ranks.device("cuda")


def merge(ranks: Ranks, values: Values, known: Values | None) -> Values:
    """The values of all processes: each token was computed by one of them (or by the members of one copy, alike), or
    was ``known`` to all at the start."""
    if ranks.alone:
        return values
    import torch
    import torch.distributed as dist

    merged = {}
    for name, mine in values.items():
        fresh = ~np.isnan(mine)
        if known is not None:
            fresh &= np.isnan(known[name])
        if ranks.member:
            fresh[:] = False
        # Adding zeros is exact: one process's bits come through unchanged.
        tensor = torch.from_numpy(np.where(fresh, mine, 0))
        owners = torch.from_numpy(fresh.astype(np.int32))
        dist.all_reduce(tensor)
        dist.all_reduce(owners)
        computed = owners.numpy() > 0
        merged[name] = np.where(computed, tensor.numpy(), np.nan if known is None else known[name]).astype(
            mine.dtype
        )
    return merged


def merge_timing(ranks: Ranks, timing: Timing) -> Timing:
    """The tokens of all processes and the time of the slowest."""
    if ranks.alone:
        return timing
    import torch
    import torch.distributed as dist

    seconds, tokens = torch.tensor([timing.seconds]), torch.tensor([0 if ranks.member else timing.tokens])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    dist.all_reduce(tokens)
    return Timing(float(seconds), int(tokens))

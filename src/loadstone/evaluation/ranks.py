"""Several processes under ``torchrun`` or ``accelerate launch``: the same batches, divided; the same
numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadstone.evaluation.scoring.losses import Timing, Values


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others; alone, (0, 1)."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device for this process: one GPU each, where GPUs were asked for and are there."""
        import torch

        if self.count == 1 or asked not in ("auto", "cuda") or not torch.cuda.is_available():
            return asked
        return f"cuda:{self.local % torch.cuda.device_count()}"

    def merge(self, values: Values, known: Values | None) -> Values:
        """All processes' values: each token was computed by one of them, or was ``known`` to all at the
        start."""
        if self.count == 1:
            return values
        import torch
        import torch.distributed as dist

        merged = {}
        for name, mine in values.items():
            fresh = ~np.isnan(mine)
            if known is not None:
                fresh &= np.isnan(known[name])
            # Adding zeros is exact: one process's bits come through unchanged.
            tensor = torch.from_numpy(np.where(fresh, mine, 0))
            owners = torch.from_numpy(fresh.astype(np.int32))
            dist.all_reduce(tensor)
            dist.all_reduce(owners)
            computed = owners.numpy() > 0
            merged[name] = np.where(
                computed, tensor.numpy(), np.nan if known is None else known[name]
            ).astype(mine.dtype)
        return merged

    def merge_timing(self, timing: Timing) -> Timing:
        """Tokens of all processes over the time of the slowest."""
        if self.count == 1:
            return timing
        import torch
        import torch.distributed as dist

        seconds, tokens = torch.tensor([timing.seconds]), torch.tensor([timing.tokens])
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        dist.all_reduce(tokens)
        return Timing(float(seconds), int(tokens))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks, on every process."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that the launcher started (WORLD_SIZE in the environment), for the length of a
    block."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    # Sums are exchanged once a model, on the host: gloo does for GPUs too.
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if ours:
            dist.destroy_process_group()

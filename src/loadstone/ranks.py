"""One process, or one of several that ``torchrun`` started: who does what, and waiting for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``size`` that divide the work; rank 0 makes the directory and publishes it.

    Where a copy of a model is divided among ``members`` processes, ``rank`` and ``size`` count the copies, and
    ``member`` is the place within this one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    member: int = 0
    members: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.rank == 0 and self.member == 0

    @property
    def alone(self) -> bool:
        return self.size * self.members == 1

    def in_copies(self, members: int) -> Ranks:
        """The same processes, each ``members`` of which hold a copy of a model together."""
        rank, member = divmod(self.rank, members)
        return replace(self, rank=rank, size=self.size // members, member=member, members=members)

    def wait(self) -> None:
        """Return when every rank has come here."""
        if not self.alone:
            import torch.distributed as dist

            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks, on every process."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * (self.size * self.members)
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.alone:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def combine(
        self, tensor: torch.Tensor, how: Literal["sum", "max"], to: int | None = None
    ) -> torch.Tensor:
        """The sum or the largest of all ranks' tensors of one shape, on the CPU: on every rank, or on rank ``to``
        alone, where others get anything."""
        mine = tensor.contiguous().cpu()
        if self.alone:
            return mine
        import torch.distributed as dist

        # The caller's tensor stays as it is.
        mine = mine.clone() if mine.data_ptr() == tensor.data_ptr() else mine
        op = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
        if to is None:
            dist.all_reduce(mine, op)
        else:
            dist.reduce(mine, to, op)
        return mine


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the job's process group when torchrun's variables are set; gloo, because tensors are exchanged on the CPU
    only."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
    try:
        yield Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if ours:
            dist.destroy_process_group()

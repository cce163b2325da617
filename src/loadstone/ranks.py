"""One process, or one of several that ``torchrun`` started: who does what, and waiting for each other."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, cached_property
from itertools import count
from socket import gethostname
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from loadstone.errors import MissingError, UsageError

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

    def device(self, device: str) -> str:
        """``device``, or where that is a GPU and there are several ranks this rank's own one."""
        if self.alone or not device.startswith("cuda"):
            return device
        import torch

        return f"cuda:{self.local_rank % max(torch.cuda.device_count(), 1)}"

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

    def combine(self, tensor: torch.Tensor, how: Literal["sum", "max"]) -> torch.Tensor:
        """The sum or the largest of all ranks' tensors of one shape, on every rank and the tensor's device."""
        mine, group = self._to_exchange(tensor)
        if not self.alone:
            import torch.distributed as dist

            dist.all_reduce(mine, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group)
        return mine.to(tensor.device)

    def sums(self, tensors: Iterable[torch.Tensor], to: int) -> Iterator[torch.Tensor]:
        """The sums of all ranks' tensors one after the other, where they were exchanged (CPU or GPU): on rank ``to``,
        others get anything. A few are on their way while the next is copied."""
        import torch.distributed as dist

        on_the_way: deque[tuple[torch.Tensor, Any]] = deque()
        for tensor in tensors:
            mine, group = self._to_exchange(tensor)
            work = None if self.alone else dist.reduce(mine, to, group=group, async_op=True)
            on_the_way.append((mine, work))
            if len(on_the_way) > 2:
                yield _arrived(*on_the_way.popleft())
        while on_the_way:
            yield _arrived(*on_the_way.popleft())

    def _to_exchange(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """A copy of ``tensor`` where it can be exchanged, and the group that does so: None is gloo, on the CPU."""
        import torch

        group = self._gpus if tensor.is_cuda and not self.alone else None
        stays = self.alone or group is not None
        device = tensor.device if stays else "cpu"
        return tensor.to(device, copy=True, memory_format=torch.contiguous_format), group

    @cached_property
    def _gpus(self) -> Any:
        """NCCL's group of all ranks, which all of them make at once; None where two share a GPU, which it refuses."""
        import torch
        import torch.distributed as dist

        gpu = torch.cuda.get_device_properties(self.device("cuda")).uuid
        if len(set(self.gather((gethostname(), str(gpu))))) < self.size * self.members:
            return None
        return dist.new_group(timeout=_PATIENCE, backend="nccl") if dist.is_nccl_available() else None


def _arrived(tensor: torch.Tensor, work: Any) -> torch.Tensor:
    if work is not None:
        work.wait()
    return tensor


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the job's process group when torchrun's variables are set; gloo, beside which NCCL is used once tensors on
    GPUs are exchanged.

    Within the block this process ends, with exit code 5 and a message, when another rank fails or stops answering.
    Raises `MissingError` where that shows in an exchange, `UsageError` where the variables are not a launcher's.
    """
    size = _number("WORLD_SIZE", "1")
    if size == 1:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    local_rank = _number("LOCAL_RANK", "0")
    if dist.is_initialized():
        # By the caller, who also watches.
        yield Ranks(dist.get_rank(), size, local_rank)
        return
    ranks = Ranks(_number("RANK"), size, local_rank)
    _number("MASTER_PORT")
    if ranks.rank >= size or not os.environ.get("MASTER_ADDR"):
        raise UsageError(
            f"WORLD_SIZE is {size}, RANK {ranks.rank} and MASTER_ADDR {os.environ.get('MASTER_ADDR', '')!r}",
            _LAUNCH,
        )
    session = next(_sessions)
    watch = _Watch(ranks, session)
    # torchrun has a store already; without it rank 0 makes one as it joins.
    store_first = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        if store_first:
            watch.start()
        # A group that joins under the keys of an earlier one may meet addresses that are gone, and wait for them.
        store = dist.PrefixStore(f"loadstone/group/{session}", _store())
        dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=size, timeout=_PATIENCE)
        if not store_first:
            watch.start()
        yield ranks
        # Rank 0 may hold the store.
        dist.barrier()
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
        what = "has lost another rank" if lost else f"failed: {str(error) or type(error).__name__}"
        reason = watch.fail(f"rank {ranks.rank} on {gethostname()} {what}")
        if lost:
            raise MissingError(reason or "another rank of this job has stopped", _AGAIN) from error
        raise
    finally:
        # NCCL may wait for a rank that is gone, and the watch ends that.
        if not torch.cuda.is_initialized():
            watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
        watch.stop()


_LAUNCH = "Start with torchrun or accelerate launch, which set them, or unset WORLD_SIZE for one process"


def _number(variable: str, default: str = "") -> int:
    """The whole number in one of the variables that a launcher sets."""
    value = os.environ.get(variable, default)
    if not (value.isascii() and value.isdigit() and len(value) < 10) or (
        variable == "WORLD_SIZE" and int(value) == 0
    ):
        raise UsageError(f"the environment variable {variable} is {ascii(value)[:80]}, not a number", _LAUNCH)
    return int(value)


# Ranks wait as long as others work; the watch tells which have gone.
_PATIENCE = timedelta(days=30)


@cache
def _store() -> Any:
    """The job's store, which without a launcher rank 0 holds: for all of a process's calls."""
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(rendezvous("env://"))
    store.set_timeout(_PATIENCE)
    return store


# Seconds between two signs of life of a rank, without one after which it counts as gone, and until the first one.
_BEAT, _GONE, _BORN = 3.0, 30.0, 600.0
_AGAIN = "Run the same command again: what is finished is taken over (by eval with --resume)"
_sessions = count()


class _Watch:
    """Signs of life in the job's store: this rank gives its own, watches those of the next one, and ends this process
    when any rank has failed or stopped answering.

    gloo tells of a process that ended once something is exchanged with it, and never of a machine that did; NCCL of
    neither.
    """

    def __init__(self, ranks: Ranks, session: int) -> None:
        self._session = session
        self._rank, self._next = ranks.rank, (ranks.rank + 1) % ranks.size
        self._store: Any = None
        self._stopped = Event()
        self._beats, self._heard = 0, b""
        self._since = self._answered = 0.0
        self._reason = ""

    def start(self) -> None:
        """Begin, with a connection of its own to the store: a waiting call of another thread would block it."""
        import torch.distributed as dist

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        # The launcher's store outlives a restart of its processes.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"loadstone/{attempt}/{self._session}", store)
        self._since = self._answered = monotonic()
        for work in (self._beat, self._judge):
            Thread(target=work, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def fail(self, reason: str) -> str:
        """Tell the others why this rank fails; returns why another one did before it, if so."""
        with suppress(Exception):
            found = self._store.compare_set("failed", "", reason).decode()
            return "" if found == reason else str(found)
        return ""

    def _beat(self) -> None:
        while not self._stopped.is_set():
            try:
                self.round(monotonic())
            except Exception:
                # The store has gone, or this process is about to end: `_judge` knows.
                return
            self._stopped.wait(_BEAT)

    def round(self, now: float) -> None:
        """One exchange with the store, at the time ``now`` (seconds)."""
        self._beats += 1
        self._store.set(f"alive/{self._rank}", str(self._beats))
        if self._store.check(["failed"]):
            self._reason = self._store.get("failed").decode()
        key = f"alive/{self._next}"
        heard = self._store.get(key) if self._store.check([key]) else b""
        if heard != self._heard:
            self._heard, self._since = heard, now
        elif now - self._since > (_GONE if heard else _BORN):
            found = f"rank {self._next} has not answered for {now - self._since:.0f} s"
            self._reason = self._store.compare_set("failed", "", found).decode()
        self._answered = now

    def _judge(self) -> None:
        while not self._stopped.wait(_BEAT / 2):
            reason = self._reason
            if not reason and monotonic() - self._answered > _GONE:
                reason = f"the first node of this job has not answered for {_GONE:.0f} s"
            # In an exchange that fails, the main thread says so itself.
            if reason and not self._stopped.wait(_BEAT):
                print(f"loadstone: error: {reason}. {_AGAIN}", file=sys.stderr, flush=True)
                # The main thread may wait in an exchange, or for a GPU that does, which nothing interrupts.
                os._exit(MissingError.exit_code)

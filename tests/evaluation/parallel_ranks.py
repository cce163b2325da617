"""Evaluations, one after the other, on ranks that are forked from one process, which has imported the libraries.

Usage: python -m tests.evaluation.parallel_ranks RANKS CALLS.json RESULTS.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import loadstone
import loadstone.evaluation.run
from loadstone.errors import LoadstoneError
from loadstone.loading.loader import import_libraries


@contextmanager
def _interrupting(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that breaks off after the first batch."""

    def step(tokens: int) -> None:
        raise KeyboardInterrupt

    yield step


def run(call: dict[str, Any]) -> dict[str, Any]:
    interrupted = call.pop("interrupt", False)
    try:
        result = loadstone.evaluate(**call, progress=_interrupting if interrupted else None)
    except KeyboardInterrupt:
        return {"error": "interrupted"}
    except LoadstoneError as error:
        return {"error": str(error)}
    return result.as_json()


def work(rank: int, ranks: int, calls: Path, results: Path) -> None:
    """What one rank does. They have the same figures, but for those of the computation."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{results}.store", rank=rank, world_size=ranks)
    found = [run(call) for call in json.loads(calls.read_text())]
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, found)
    for result, *others in zip(found, *every, strict=True):
        if "error" in result:
            result["error"] = sorted({other.get("error", "") for other in others})
        for other in others:
            for mine, theirs in zip(result.get("models", ()), other.get("models", ()), strict=True):
                assert mine["unit_losses"] == theirs["unit_losses"]
    if rank == 0:
        results.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    import_libraries()
    count, *files = sys.argv[1:]
    # One of an earlier run would lead to ranks that are gone.
    Path(f"{files[1]}.store").unlink(missing_ok=True)
    mp.start_processes(work, (int(count), *map(Path, files)), int(count), start_method="fork")

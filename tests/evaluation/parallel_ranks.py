"""What each rank of a ``torchrun`` job of `test_parallel` runs: evaluations, one after the other in one process.

Usage: torchrun … -m tests.evaluation.parallel_ranks CALLS.json RESULTS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import loadstone
from loadstone.errors import LoadstoneError


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    calls, results = map(Path, sys.argv[1:])
    found = [run(call) for call in json.loads(calls.read_text())]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    # Every rank has the same figures, those of the computation apart.
    for other in every:
        for mine, theirs in zip(found, other, strict=True):
            for a, b in zip(mine.get("models", ()), theirs.get("models", ()), strict=True):
                assert a["unit_losses"] == b["unit_losses"]
    for result, *others in zip(found, *every, strict=True):
        if "error" in result:
            result["error"] = sorted({other.get("error", "") for other in others})
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))
    dist.destroy_process_group()

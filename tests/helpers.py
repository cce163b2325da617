"""What tests of several rooms do: run a command in this process, load as stock transformers does, compute logits."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

from loadstone.cli import main

TOKENS = torch.arange(3, 35)[None]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr in one line, of one command."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, " ".join(err.split())


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of `TOKENS`, in inference mode, as a user computes them."""
    with torch.inference_mode():
        return model(TOKENS).logits


def stock(path: Path, **options: object) -> torch.nn.Module:
    """The model as transformers loads it without loadstone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)


def on_ranks(size: int, work: Callable[[], None], check: bool = True) -> list[int]:
    """Call ``work`` in ``size`` processes with the variables that torchrun sets; returns their exit codes.

    The processes are forks of this one, so that nothing is imported again.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def on_rank(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        # torch replaces the thread pool that a fork lacks, which two threads may not do at once.
        torch.set_num_threads(1)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        # Not the end of a test session.
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=on_rank, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + 120
    while (
        len(wait([process.sentinel for process in processes], timeout=120)) < size and time.monotonic() < end
    ):
        if all(process.exitcode is not None or _is_stopped(process.pid) for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    codes = [int(process.exitcode or 0) for process in processes]
    assert not check or not any(codes), codes
    return codes


def _is_stopped(pid: int | None) -> bool:
    """Whether a process was stopped by SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

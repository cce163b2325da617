"""Two torchrun agents on one machine stand for two nodes: a shared output, a copy of the source each, one that dies."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from .test_finalize import snapshot

pytestmark = pytest.mark.slow
TEXT = "the quick brown fox jumps over the lazy dog and runs away, then comes back. " * 400


def start(node: int, port: int, source: Path, folder: Path) -> subprocess.Popen:
    """One node's agent with two ranks."""
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job",
        "--local-addr", "127.0.0.1", "--rdzv-conf", f"is_host={int(node == 0)}",
    ]  # fmt: skip
    finalize = [
        "-m", "loadstone", "finalize", "-M", source, "-o", folder / "out", "--quantize", "intx4-weight-only",
        "--calibrate", folder / "text.txt", "--calibrate-tokens", "8192", "--device", "cpu",
        "--max-shard-size", "200kB",
    ]  # fmt: skip
    return subprocess.Popen(
        [*torchrun, *map(str, finalize)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"node{node}.log").open("w"),
    )


def stop(agent: subprocess.Popen, how: signal.Signals) -> None:
    """Send a signal to all processes of a node: each rank is in a session of its own."""
    ranks = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, check=False)
    for pid in (agent.pid, *map(int, ranks.stdout.split())):
        with suppress(ProcessLookupError):
            os.kill(pid, how)


def run(folder: Path, sources: list[Path]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(node, port, source, folder) for node, source in enumerate(sources)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_that_is_gone_and_a_job_that_goes_on(
    make_model: Callable[..., Path], tmp_path: Path, how: signal.Signals
) -> None:
    sources = [tmp_path / "node0" / "model", tmp_path / "node1" / "model"]
    for source in sources:
        shutil.copytree(make_model("qwen3"), source)
    (tmp_path / "text.txt").write_text(TEXT)
    agents = run(tmp_path, sources)
    try:
        while not list(tmp_path.glob(".out.calibrated/*/00000.json")):
            assert agents[0].poll() is None, (tmp_path / "node0.log").read_text()
            time.sleep(0.05)
        stop(agents[1], how)
        gone = time.monotonic()
        assert agents[0].wait(60) != 0
        assert time.monotonic() - gone < 60
    finally:
        for agent in agents:
            stop(agent, signal.SIGKILL)
            agent.wait()
    log = (tmp_path / "node0.log").read_text()
    assert log.count("Run the same command again") >= 2, log
    assert not (tmp_path / "out").exists()
    for agent in (agents := run(tmp_path, sources)):
        assert agent.wait(240) == 0, [(tmp_path / f"node{n}.log").read_text() for n in (0, 1)]
    two = snapshot(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    command = [str(part) for part in agents[0].args]
    alone = [sys.executable, *command[command.index("loadstone") - 1 :]]
    subprocess.run(alone, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    assert snapshot(tmp_path / "out") == two

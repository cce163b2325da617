"""The parent's side of a worker: requests with a time limit, a fresh process after a crash."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120.0
# Imported model code and torch's caches stay in a process; a new one after so many requests bounds its memory.
REQUESTS = 600


class Process:
    """One worker of a kind ("stock" or "loadstone"), started on the first request."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.child: subprocess.Popen[str] | None = None
        self.requests = 0

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer: {"ok": …}, {"error": …}, or {"crash": …} where it died or took too long."""
        child = self._child()
        assert child.stdin is not None and child.stdout is not None
        self.requests += 1
        try:
            child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass
        ready, _, _ = select.select([child.stdout], [], [], TIMEOUT)
        line = child.stdout.readline() if ready else ""
        if line:
            return dict(json.loads(line))
        reason = f"the process ended with {child.wait()}" if ready else f"no answer in {TIMEOUT:.0f} s"
        self.close()
        return {"crash": reason}

    def rest(self) -> None:
        """Between two models: a fresh process where this one has worked for long."""
        if self.requests > REQUESTS:
            self.close()

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
        self.child, self.requests = None, 0

    def _child(self) -> subprocess.Popen[str]:
        if self.child is None:
            environment = os.environ | {
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "TRANSFORMERS_VERBOSITY": "warning",
                "NO_COLOR": "1",
                "COLUMNS": "200",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
            }
            self.child = subprocess.Popen(
                [sys.executable, "-m", "tests.zoo.worker", self.kind],
                cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        return self.child

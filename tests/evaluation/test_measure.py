"""Free memory: what the system has, and what the limits of a container or batch job leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loadstone.evaluation import measure

GB = 10**9


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, object]) -> None:
    """A made-up machine with 8 GiB available, in these control groups."""
    (folder / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    (folder / "groups").write_text(groups)
    for name, content in files.items():
        path = folder / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    monkeypatch.setattr(measure, "_MEMINFO", folder / "meminfo")
    monkeypatch.setattr(measure, "_GROUPS", folder / "groups")
    monkeypatch.setattr(measure, "_CGROUPS", folder / "fs")


V2 = "0::/slurm/job_7/step_0\n"
V1 = "5:devices:/\n4:cpu,memory:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    "groups, files, free",
    [
        ("", {}, 8 << 30),
        (V2, {"memory.max": "max", "memory.current": GB}, 8 << 30),
        (V2, {"slurm/job_7/step_0/memory.max": 3 * GB, "slurm/job_7/step_0/memory.current": GB}, 2 * GB),
        # A parent's limit binds too, and what is only cached comes back.
        (
            V2,
            {
                "slurm/job_7/step_0/memory.max": "max",
                "slurm/job_7/step_0/memory.current": GB,
                "slurm/job_7/memory.max": 4 * GB,
                "slurm/job_7/memory.current": 3 * GB,
                "slurm/job_7/memory.stat": f"anon 5\ninactive_file {GB}\nactive_file 7",
            },
            2 * GB,
        ),
        # Inside a container its own group is the root, whatever the path says.
        (V2, {"memory.max": 2 * GB, "memory.current": GB}, GB),
        (
            V1,
            {
                "memory/docker/abc/memory.limit_in_bytes": 5 * GB,
                "memory/docker/abc/memory.usage_in_bytes": 2 * GB,
                "memory/docker/abc/memory.stat": f"cache 1\ntotal_inactive_file {GB}",
                "memory/memory.limit_in_bytes": 9223372036854771712,
                "memory/memory.usage_in_bytes": 2 * GB,
            },
            4 * GB,
        ),
        (V2, {"memory.max": GB, "memory.current": 2 * GB}, 0),
    ],
)
def test_free_memory_within_limits(
    groups: str, files: dict[str, object], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, groups, files)
    assert measure.free_bytes(torch.device("cpu")) == free


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MEMINFO", "_GROUPS", "_CGROUPS"):
        monkeypatch.setattr(measure, name, tmp_path / "none")
    assert measure.free_bytes(torch.device("cpu")) == 4 << 30

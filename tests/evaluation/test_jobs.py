"""The job files in recipes/, their shell parts run on the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def environment(model_dir: Path, worse_dir: Path, tmp_path: Path) -> dict[str, str]:
    """With `loadstone` and `python` on the path, whatever the tests run under."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, command in (("loadstone", f"{sys.executable} -m loadstone"), ("python", sys.executable)):
        (tools / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (tools / name).chmod(0o755)
    source = str(RECIPES.parent / "src")
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": source,
        "OMP_NUM_THREADS": "1",
        "BASELINE": str(model_dir),
        "MODEL": str(worse_dir),
        "LIMIT": "3",
        "RESULT": str(tmp_path / "result.json"),
        "CACHE": str(tmp_path / "cache"),
    }


def run(script: str, environment: dict[str, str], **changes: str) -> subprocess.CompletedProcess[str]:
    shell = "bash" if script.endswith("sbatch") else "sh"
    return subprocess.run(
        [shell, str(RECIPES / script)], env=environment | changes, capture_output=True, text=True
    )


def test_ci_gate(environment: dict[str, str]) -> None:
    passed = run("ci_gate.sh", environment, GATE="dloss>9@95")
    assert passed.returncode == 0, passed.stderr
    failed = run("ci_gate.sh", environment, GATE="dloss>-9@95")
    assert failed.returncode == 4 and "failed by" in failed.stderr
    result = json.loads(Path(environment["RESULT"]).read_text())
    assert result["gates"][0]["failed"] and all(m["cached"] for m in result["models"])


def test_ci_gate_wants_its_models(environment: dict[str, str]) -> None:
    del environment["MODEL"]
    done = run("ci_gate.sh", environment)
    assert done.returncode != 0 and "quantized model" in done.stderr


@pytest.mark.slow
def test_slurm_job(environment: dict[str, str]) -> None:
    done = run("slurm_eval.sbatch", environment, LAUNCH="env", PROCESSES="2", GATE="dloss>9")
    assert done.returncode == 0, done.stderr
    assert json.loads(Path(environment["RESULT"]).read_text())["models"][1]["delta_loss"] is not None


def test_slurm_job_starts_with_srun_or_what_launch_says(environment: dict[str, str], tmp_path: Path) -> None:
    for name in ("python", "srun", "other"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} $1\n")
        (tmp_path / name).chmod(0o755)
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    assert run("slurm_eval.sbatch", environment).stdout.startswith("srun --kill")
    assert run("slurm_eval.sbatch", environment, LAUNCH="other").stdout == "other python\n"
    # Set and empty: no launcher.
    assert run("slurm_eval.sbatch", environment, LAUNCH="").stdout == "python -m\n"


@pytest.mark.parametrize("script", ["slurm_eval.sbatch", "slurm_finalize.sbatch"])
def test_slurm_jobs_of_several_nodes(
    script: str, environment: dict[str, str], tmp_path: Path, model_dir: Path
) -> None:
    for name, answer in (("python", "$@"), ("scontrol", "node7")):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{answer}"\n')
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "5",
        "LAUNCH": "",
        "PROCESSES": "4",
    }
    job |= {
        "OUT": "out",
        "RECIPE": "int8-weight-only",
        "SCRATCH": str(tmp_path / "scratch"),
        "MODEL": str(model_dir),
    }
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = run(script, environment, **job)
    assert done.returncode == 0, done.stderr
    several = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node7:29400 --rdzv-id 5 --nproc-per-node 4 -m loadstone"
    assert done.stdout.startswith(f"-m torch.distributed.run {several}")
    if "finalize" in script:
        copy = tmp_path / "scratch" / model_dir.name
        assert f" -M {copy} -o out --quantize int8-weight-only --device auto" in done.stdout
        times = [{p.name: p.stat().st_mtime_ns for p in folder.iterdir()} for folder in (copy, model_dir)]
        assert times[0] == times[1]


def test_workflow_runs_what_there_is() -> None:
    workflow = yaml.safe_load((RECIPES / "github-actions-gate.yml").read_text())
    steps = workflow["jobs"]["gate"]["steps"]
    script = next(s for s in steps if s.get("name") == "Finalize and gate")
    assert "sh recipes/ci_gate.sh" in script["run"] and {"BASELINE", "MODEL", "GATE"} <= set(script["env"])
    subprocess.run(["sh", "-n"], input=script["run"], text=True, check=True)

"""On a CUDA card: blocks of rows, calibration and several ranks give the bytes that one pass on it gives."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.errors import LoadstoneError
from loadstone.finalization import units
from loadstone.finalization.calibrate import calibrate
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.quantization import RECIPES, parse_recipe
from loadstone.quantization.quantize import check_runs

from .test_finalize import snapshot

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = "cuda:0"


def spelled(name: str) -> str:
    """The recipe with a group that fits the tiny models."""
    return f"{name}:group_size=32" if name == "int4-weight-only" else name


def plan_on_cuda(source: Path, recipe: str):
    try:
        check_runs(parse_recipe(recipe), CUDA, "bfloat16")
    except LoadstoneError as error:
        pytest.skip(str(error))
    return make_plan(loadstone.detect(source), parse_recipe(recipe), device=CUDA)


@pytest.mark.parametrize("recipe", RECIPES)
def test_row_blocks_give_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    plan = plan_on_cuda(tiny, spelled(recipe))
    write_plan(plan, tmp_path / "whole", device=CUDA)
    monkeypatch.setattr(units, "GPU_BLOCK", 1000)
    write_plan(plan, tmp_path / "blocks", device=CUDA)
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "blocks")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
@pytest.mark.parametrize(
    ("recipe", "algorithm"),
    [
        ("int4-weight-only:group_size=32", None),
        ("int8-dynamic-act-int4-weight", None),
        ("int8-dynamic-act-int4-weight", "gptq"),
        ("intx4-weight-only", "awq"),
    ],
)
def test_two_gpus_give_the_same_bytes(tiny: Path, tmp_path: Path, recipe: str, algorithm: str | None) -> None:
    options = ["--quantize", recipe, "--max-shard-size", "30kB", "--device", "cuda", "--quiet"]
    if algorithm:
        options += ["--algorithm", algorithm, "--calibrate", "sample", "--calibrate-tokens", "1024"]

    def run(prefix: list[str], folder: Path) -> dict[str, str]:
        folder.mkdir()
        command = [*prefix, "-m", "loadstone", "finalize", "-M", str(tiny), "-o", "out", *options]
        done = subprocess.run(
            command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return snapshot(folder / "out")

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    assert run(torchrun, tmp_path / "two") == run([sys.executable], tmp_path / "one")


def test_calibrated_on_cuda(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model("llama-tied")
    torch.manual_seed(0)
    rows = torch.randint(3, 250, (8, 64))
    plan = plan_on_cuda(source, "intx4-weight-only:rounding=gptq")
    write_plan(calibrate(plan, rows, tmp_path / "work", device=CUDA), tmp_path / "gptq", device=CUDA)
    write_plan(plan_on_cuda(source, "intx4-weight-only"), tmp_path / "plain", device=CUDA)
    with torch.inference_mode():
        wanted = loadstone.load(source, device="cpu")(rows).logits.float()
        errors = [
            (loadstone.load(tmp_path / name, device="cpu")(rows).logits.float() - wanted).square().mean()
            for name in ("plain", "gptq")
        ]
    assert errors[1] < errors[0]

"""On a CUDA card: blocks of rows, calibration and several ranks give the bytes that one pass on it gives."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.errors import LoadstoneError
from loadstone.finalization import units
from loadstone.finalization.calibrate import calibrate
from loadstone.finalization.gptq import gptq
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


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
@pytest.mark.parametrize(
    ("recipe", "width"),
    [
        ("intx4-weight-only:group_size=32", 416),
        ("intx4-weight-only:group_size=64,mapping=asymmetric", 448),
        ("intx4-weight-only:group_size=96", 288),
        ("intx4-weight-only:group_size=256", 512),
        ("intx3-weight-only:group_size=0", 300),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_of_gptq_gives_the_bits_of_torch(
    monkeypatch: pytest.MonkeyPatch, recipe: str, width: int, dtype: torch.dtype
) -> None:
    from loadstone.finalization import columns, columns_kernel

    torch.manual_seed(1)
    weights = [torch.randn(rows, width, dtype=dtype, device=CUDA) for rows in (65, 130)]
    inputs = torch.randn(512, width, device=CUDA) @ torch.randn(width, width, device=CUDA)
    arguments = (weights, inputs.t() @ inputs, parse_recipe(recipe).scheme)
    calls = []
    kernel = columns_kernel.round_columns
    monkeypatch.setattr(columns_kernel, "round_columns", lambda *args: (calls.append(args), kernel(*args)))
    found = gptq(*arguments)
    assert calls
    monkeypatch.setattr(columns_kernel, "round_columns", columns.round_columns)
    for one, other in zip(found, gptq(*arguments), strict=True):
        for name in ("qdata", "scale", "zero_point"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


# A rank ends while another waits for a GPU that exchanges with it.
GONE = """
import os, signal, time, torch
from tests.helpers import on_ranks
from loadstone import ranks as module
from loadstone.ranks import joined
module._BEAT, module._GONE = 0.5, 6.0

def work():
    with joined() as ranks:
        torch.cuda.set_device(ranks.local_rank)
        ones = torch.ones(1000, dtype=torch.float64, device="cuda")
        assert ranks.combine(ones, "sum").equal(2 * ones) and ranks._gpus is not None
        assert list(ranks.sums([ones], 0))[0].equal(2 * ones) or ranks.rank
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.HOW)
        print(ranks.combine(ones, "sum").sum())

print(on_ranks(2, work, check=False))
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_gone_ends_one_that_waits_for_its_gpu(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GONE.replace("HOW", how)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip
    assert "[5, -9]" in done.stdout, done.stdout + done.stderr
    assert "Run the same command again" in done.stderr

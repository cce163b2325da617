"""What a plan knows before any tensor is read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.finalization.plan import make_plan, weight_dtype
from loadstone.quantization import parse_recipe

from .test_finalize import W4


def test_a_bin_with_tied_weights_stores_them_once(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_bytes((tiny / "config.json").read_bytes())
    torch.save(loadstone.load(tiny).state_dict(), source / "pytorch_model.bin")
    plan = make_plan(loadstone.detect(source), parse_recipe(W4))
    assert "lm_head.weight" not in {step.name for step in plan.steps}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weight_dtype(make_model: Callable[..., Path], dtype: str) -> None:
    artifact = loadstone.detect(make_model("llama-tied", dtype))
    assert weight_dtype(artifact, "auto") == dtype
    assert weight_dtype(artifact, "float16") == "float16"

"""On a GPU: folding there gives the CPU's bytes, and models that accelerate spread over GPU, CPU and disk export
them too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakequant.conftest import TOKENS, Snapshot, hashes, load

from loadstone import export_fakequant
from loadstone.fakequant.formats import FORMATS, parse_format
from loadstone.fakequant.formats.fold import fold, fold_input

pytestmark = pytest.mark.gpu

TEXTS = [*FORMATS, "fp8:granularity=row", "fp8:granularity=block"]


def many_sizes(dtype: torch.dtype) -> torch.Tensor:
    """A million values over many powers of two, and scales that lie just above and below one."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(1024, 1024, generator=generator) * torch.logspace(-4, 1, 1024)[:, None]
    steps = torch.arange(-8, 8).repeat_interleave(32)
    for row, power in enumerate(range(-12, 4)):
        for format_max, at in ((6.0, 0), (448.0, 512)):
            edge = torch.tensor(format_max * 2.0**power).view(torch.int32) + steps
            weight[row, at : at + 512] = edge.to(torch.int32).view(torch.float32)
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_a_weight_folds_to_the_same_bits(text: str, dtype: torch.dtype) -> None:
    weight, spec = many_sizes(dtype), parse_format(text).weight
    here, there = fold("w", weight, spec), fold("w", weight.cuda(), spec)
    assert there.is_cuda and torch.equal(there.cpu(), here)


@pytest.mark.parametrize("spec", ["int8", "fp8", "fp8-token", "nvfp4", "mxfp8", "mxfp4"])
def test_an_input_rounds_to_the_same_bits(spec: Any) -> None:
    x, amax = many_sizes(torch.bfloat16), torch.tensor(3.7)
    assert torch.equal(fold_input(x.cuda(), spec, amax.cuda()).cpu(), fold_input(x, spec, amax))


@pytest.mark.parametrize("text", FORMATS)
def test_folded_on_the_gpu(text: str, tiny: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        export_fakequant(tiny, tmp_path / device, format=text, device=device)
    assert hashes(tmp_path / "cpu") == hashes(tmp_path / "cuda")


@pytest.mark.parametrize("second", ["cpu", "disk"])
def test_offloaded_beside_a_gpu(second: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model("llama-tied")
    places = {"model.embed_tokens": 0, "lm_head": 0, "model.norm": 0, "model.rotary_emb": 0}
    places |= {"model.layers.0": 0, "model.layers.1": second}
    model = load(source, device_map=places, offload_folder=tmp_path / "offload")
    assert {p.device.type for p in model.parameters()} == {"cuda", "meta"}
    before = Snapshot(model)
    export_fakequant(model, tmp_path / "live", format="nvfp4")
    before.check()
    export_fakequant(source, tmp_path / "directory", format="nvfp4", device="cpu")
    assert hashes(tmp_path / "live") == hashes(tmp_path / "directory")


def test_calibrated_on_the_gpu(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = make_model("llama-untied", dtype="float32")
    options: dict[str, Any] = {"format": "fp8", "kv_cache": "fp8", "activations": True}
    export_fakequant(load(source, device_map={"": 0}), tmp_path / "gpu", calibrate=[TOKENS], **options)
    export_fakequant(source, tmp_path / "cpu", calibrate=[TOKENS], device="cpu", **options)
    there, here = (load_file(tmp_path / n / "fakequant_state.safetensors") for n in ("gpu", "cpu"))
    assert there.keys() == here.keys() and len(here) == 14 + 4
    for name, amax in here.items():
        assert torch.allclose(there[name], amax, rtol=1e-2), name

"""On a GPU: folding there gives the CPU's bytes, and models that accelerate spread over GPU and CPU
export them too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.fakequant.conftest import hashes, load

from loadstone import export_fakequant
from loadstone.fakequant.formats import FORMATS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("text", FORMATS)
def test_folded_on_the_gpu(text: str, tiny: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        export_fakequant(tiny, tmp_path / device, format=text, device=device)
    assert hashes(tmp_path / "cpu") == hashes(tmp_path / "cuda")


def test_offloaded_beside_a_gpu(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model("llama-tied")
    model = load(source, device_map="auto", max_memory={0: "200KiB", "cpu": "1GiB"})
    assert any(p.device.type == "meta" for p in model.parameters())
    assert any(p.device.type == "cuda" for p in model.parameters())
    tokens = torch.arange(3, 35, device="cuda")[None]
    with torch.no_grad():
        before = model(tokens).logits
    export_fakequant(model, tmp_path / "live", format="nvfp4")
    export_fakequant(source, tmp_path / "directory", format="nvfp4", device="cpu")
    assert hashes(tmp_path / "live") == hashes(tmp_path / "directory")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


def test_calibrated_on_the_gpu(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny, device_map={"": 0})
    export_fakequant(
        model,
        tmp_path / "out",
        format="fp8",
        kv_cache="fp8",
        activations=True,
        calibrate=[torch.arange(3, 35)],
    )
    assert (tmp_path / "out" / "fakequant_state.safetensors").is_file()

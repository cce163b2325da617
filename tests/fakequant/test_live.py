"""Live models: the bytes of the directory's export from every kind of offload, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone import export_fakequant
from loadstone.errors import ArtifactError, UsageError
from tests.fakequant.conftest import SET_UPS, Snapshot, hashes, load, logits, manifest, tensors


@pytest.fixture(scope="module")
def expected(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory's own export, made once."""
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp("expected") / "out"
            export_fakequant(make_model(arch), made[arch], format="nvfp4")
        return made[arch]

    return make


@pytest.mark.parametrize("arch", ["llama-tied", "llama-untied", "qwen3-moe"])
def test_resident_equals_directory(
    arch: str, make_model: Callable[..., Path], expected: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(make_model(arch))
    before = Snapshot(model)
    export_fakequant(model, tmp_path / "out", format="nvfp4")
    assert hashes(tmp_path / "out") == hashes(expected(arch))
    before.check()


@pytest.mark.parametrize("arch", ["llama-tied", "llama-untied", "qwen3-moe"])
def test_offloaded_equals_directory(
    arch: str,
    set_up: Callable[[Path, Path], Any],
    make_model: Callable[..., Path],
    expected: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model = set_up(make_model(arch), tmp_path / "offload")
    assert any(p.device.type == "meta" for p in model.parameters())
    before = Snapshot(model)
    export_fakequant(model, tmp_path / "out", format="nvfp4")
    assert hashes(tmp_path / "out") == hashes(expected(arch))
    before.check()

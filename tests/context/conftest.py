"""Small random PFNs: every property that is not about quality holds for random weights too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loadstone.context.pfn.config import PFNConfig
from loadstone.context.pfn.model import PFN


def random_pfn(seed: int = 0, **sizes: object) -> PFN:
    """A PFN with weights large enough that attention and targets matter."""
    torch.manual_seed(seed)
    model = PFN(PFNConfig(**({"width": 32, "hidden": 64, "layers": 3, "bars": 20, "classes": 5} | sizes)))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model.requires_grad_(False).eval()


def write_pfn(model: PFN, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))
    return directory


@pytest.fixture(scope="session")
def pfn() -> PFN:
    return random_pfn()


@pytest.fixture(scope="session")
def pfn_dir(pfn: PFN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pfn(pfn, tmp_path_factory.mktemp("base") / "pfn")


@pytest.fixture(scope="session")
def rows() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``rows(n, d, dtype)``: training rows and a smooth target."""

    def make(
        n: int = 20, d: int = 6, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(n + d)
        x = torch.rand(n, d, generator=generator, dtype=torch.float64)
        y = torch.sin(3 * x).sum(-1) + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
        return x.to(dtype), y.to(dtype)

    return make

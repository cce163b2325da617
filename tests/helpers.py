"""What tests of several rooms do: run a command in this process, load as stock transformers does, compute logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loadstone.cli import main

TOKENS = torch.arange(3, 35)[None]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr in one line, of one command."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, " ".join(err.split())


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of `TOKENS`, in inference mode, as a user computes them."""
    with torch.inference_mode():
        return model(TOKENS).logits


def stock(path: Path, **options: object) -> torch.nn.Module:
    """The model as transformers loads it without loadstone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)

"""Make, save and try the tiny model of one type, with transformers alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tests.zoo.classes import model_class
from tests.zoo.configs import tiny_config
from tests.zoo.inputs import candidates, run, with_placeholders

LARGEST = 60_000_000

_ASSISTANT = "transformers 5.23 cannot make it: its config wants all layers shared, its model refuses that"
IMPOSSIBLE = {"gemma4_assistant": _ASSISTANT, "gemma4_unified_assistant": _ASSISTANT}


class NoModel(Exception):
    """This type has no model that can be made here; the text says why."""


def build(model_type: str) -> Any:
    """The random model of this type, in float32, with no parameter constant."""
    if model_type in IMPOSSIBLE:
        raise NoModel(IMPOSSIBLE[model_type])
    torch.manual_seed(0)
    config = tiny_config(model_type)
    try:
        cls = model_class(model_type, config)
        if cls is None:
            raise NoModel("a part of other models: transformers has no class that stands alone")
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        if count > LARGEST:
            raise ValueError(f"the general rules make a model of {count:,} parameters: add an exception")
        model = cls(config)
    except ImportError as error:
        raise NoModel(" ".join(str(error).split())[:160]) from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            largest = parameter.abs().max()
            if parameter.min() == parameter.max() and largest.isfinite():
                # A bias of zeros or a norm of ones would hide a tensor put in the wrong place.
                parameter.copy_(parameter * (1 + 0.1 * noise) + 0.02 * noise)
            elif not 1e-3 < largest < 1e4:
                parameter.copy_(noise * 0.02)
    return model.eval()


def save(model_type: str, path: Path) -> dict[str, Any]:
    """Save the model at `path/model` and an input beside it.

    The dtype is bfloat16, or float32 where the forward pass takes no bfloat16.
    """
    model = build(model_type)
    facts: dict[str, Any] = {
        "class": f"{type(model).__module__}:{type(model).__name__}",
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    for dtype in (torch.bfloat16, torch.float32):
        cast = model.to(dtype) if dtype is torch.bfloat16 else build(model_type)
        inputs, error = _first_input(cast)
        if inputs is not None:
            break
    if inputs is None:
        cast = cast.to(torch.bfloat16)
    facts |= {
        "dtype": str(cast.dtype).removeprefix("torch."),
        "inputs": sorted(inputs or {}),
        "no_inputs": error,
    }
    cast.save_pretrained(path / "model")
    torch.save(inputs, path / "inputs.pt")
    (path / "facts.json").write_text(json.dumps(facts))
    return facts


def _first_input(model: Any) -> tuple[dict[str, Any] | None, str]:
    """The first input that the model takes, or why it took none."""
    errors: list[str] = []
    for extra in ({}, {"use_cache": False}):
        for inputs in candidates(model):
            attempt: dict[str, Any] | None = inputs | extra
            while attempt is not None:
                reason = _refusal(model, attempt)
                if not reason:
                    return attempt, ""
                errors.append(f"{sorted(attempt)}: {reason}")
                attempt = with_placeholders(attempt, reason, model.config)
    return None, "; ".join(dict.fromkeys(errors)) or "no input known"


def _refusal(model: Any, inputs: dict[str, Any]) -> str:
    try:
        out = run(model, inputs)
    except Exception as failed:
        return f"{type(failed).__name__}: {' '.join(str(failed).split())[:200]}"
    if not out:
        return "no outputs"
    finite = all(bool(o.isfinite().any()) for o in out if o.is_floating_point() and o.numel())
    return "" if finite else "outputs are not finite"

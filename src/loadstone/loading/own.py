"""Models of loadstone's own, which transformers does not know: in-context models such as the PFN."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loadstone.artifact.values import check_values
from loadstone.errors import ArtifactError
from loadstone.loading.plan import LoadPlan

if TYPE_CHECKING:
    from torch import nn

# model_type -> its class, imported when it is loaded: rooms above this one may define models, not be imported by it.
_CLASSES = {"loadstone-pfn": ("loadstone.context.pfn.model", "PFN")}


def load_own(plan: LoadPlan, device_map: Any) -> nn.Module:
    """Build the model from its config and fill it from safetensors, strictly. Its parameters are frozen.

    Raises `ArtifactError` naming the first tensor that is missing, unexpected, of another shape, or not finite.
    """
    import torch
    from safetensors.torch import load_file

    artifact = plan.artifact
    module, name = _CLASSES[artifact.config["model_type"]]
    if not artifact.source.streamable:
        raise ArtifactError(f"'{artifact.root}': a {name} is read from safetensors only", "Save it again")
    with torch.device("meta"):
        model = getattr(import_module(module), name).from_config(artifact.config)
    expected = model.state_dict()
    for key in [*expected, *artifact.tensors]:
        if key not in artifact.tensors:
            raise ArtifactError(f"'{artifact.root}': tensor '{key}' is missing", "Copy the model again")
        if key not in expected:
            raise ArtifactError(
                f"'{artifact.root}': tensor '{key}' belongs to no {name}", "Copy the model again"
            )
        stored = artifact.tensors[key].shape
        if stored != tuple(expected[key].shape):
            raise ArtifactError(
                f"'{artifact.root}': tensor '{key}' is {list(stored)}, the config says {list(expected[key].shape)}",
                "Copy config.json and weights of one model",
            )
    check_values(artifact.path, list(artifact.tensors.values()))
    device = "cpu" if device_map is None else device_map[""]
    dtype = None if plan.dtype == "auto" else getattr(torch, plan.dtype)
    state: dict[str, torch.Tensor] = {}
    for file in artifact.weights.files:
        state |= load_file(artifact.path / file, device=str(device))
    # Borders and other buffers keep their precision whatever the parameters are computed in.
    buffers = dict(model.named_buffers())
    state = {
        key: tensor if key in buffers else tensor.to(dtype or tensor.dtype) for key, tensor in state.items()
    }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)

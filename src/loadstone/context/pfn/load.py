"""Loading a PFN, which transformers does not know."""

from __future__ import annotations

import torch

from loadstone.artifact.formats.safetensors import open_tensors
from loadstone.artifact.values import check_values
from loadstone.context.pfn.model import PFN
from loadstone.errors import ArtifactError
from loadstone.loading.placement import resolve_device
from loadstone.loading.plan import LoadPlan


@torch.inference_mode(mode=False)
def load_pfn(plan: LoadPlan) -> PFN:
    """Build the model from its config and fill it from safetensors, strictly; eval mode, parameters frozen.

    Raises `ArtifactError` naming the first tensor that is missing, unexpected, of another shape, or not finite.
    """
    artifact = plan.artifact
    if not artifact.source.streamable:
        raise ArtifactError(f"'{artifact.root}': a PFN is read from safetensors only", "Save it again")
    with torch.device("meta"):
        model = PFN.from_config(artifact.config)
    expected = model.state_dict()
    for key in [*expected, *artifact.tensors]:
        if key not in artifact.tensors:
            raise ArtifactError(f"'{artifact.root}': tensor '{key}' is missing", "Copy the model again")
        if key not in expected:
            raise ArtifactError(
                f"'{artifact.root}': tensor '{key}' is not part of a PFN", "Copy the model again"
            )
        stored = artifact.tensors[key].shape
        if stored != tuple(expected[key].shape):
            raise ArtifactError(
                f"'{artifact.root}': tensor '{key}' is {list(stored)}, the config says {list(expected[key].shape)}",
                "Copy config.json and weights of one model",
            )
    check_values(artifact.path, list(artifact.tensors.values()))
    device_map = resolve_device(plan.device, artifact, plan.dtype)
    device = "cpu" if device_map is None else device_map[""]
    dtype = None if plan.dtype == "auto" else getattr(torch, plan.dtype)
    state: dict[str, torch.Tensor] = {}
    for file in artifact.weights.files:
        with open_tensors(artifact.path / file) as handle:
            state |= {name: handle.get_tensor(name).to(device) for name in handle.keys()}  # noqa: SIM118
    # Borders and other buffers keep their precision whatever the parameters are computed in.
    buffers = dict(model.named_buffers())
    state = {
        key: tensor if key in buffers else tensor.to(dtype or tensor.dtype) for key, tensor in state.items()
    }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()

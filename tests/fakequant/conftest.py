"""Models offloaded in every way that accelerate knows, and what an export wrote."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loadstone.artifact.hashing import sha256_file

TOKENS = torch.arange(3, 35)[None]
# The manifests say where a model came from; everything else must not depend on it.
MANIFESTS = ("loadstone.json", "fakequant_manifest.json")


def hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file of an export but the manifests."""
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and p.name not in MANIFESTS)
    return {str(p.relative_to(directory)): sha256_file(p) for p in files}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every weight of an export."""
    return {k: v for p in sorted(directory.glob("model*.safetensors")) for k, v in load_file(p).items()}


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "fakequant_manifest.json").read_text())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.clone()


def load(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, **options).eval()


def cpu_offload(directory: Path, folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(load(directory), execution_device=torch.device("cpu"))


def disk_offload(directory: Path, folder: Path) -> Any:
    from accelerate import disk_offload

    return disk_offload(load(directory), folder, execution_device=torch.device("cpu"))


def dispatched(directory: Path, folder: Path) -> Any:
    from accelerate import dispatch_model

    model = load(directory)
    base = model.base_model_prefix
    layers = "h" if hasattr(model.base_model, "h") else "layers"
    places = {name: "cpu" for name, _ in model.base_model.named_children() if name != layers}
    device_map = {f"{base}.{name}": place for name, place in places.items()}
    device_map |= {f"{base}.{layers}.0": "cpu", f"{base}.{layers}.1": "disk", "lm_head": "cpu"}
    return dispatch_model(model, device_map, offload_dir=folder, main_device="cpu", force_hooks=True)


def from_pretrained(directory: Path, folder: Path) -> Any:
    model = load(directory)
    names = [name for name, _ in model.base_model.named_children()]
    device_map: dict[str, Any] = {f"{model.base_model_prefix}.{n}": "cpu" for n in names}
    device_map |= {f"{model.base_model_prefix}.layers": "disk", "lm_head": "cpu"}
    return load(directory, device_map=device_map, offload_folder=folder)


def gpu_replica(directory: Path, folder: Path) -> Any:
    """What `dispatch_model` builds for layers that stay on the CPU beside a GPU, with the CPU in the GPU's place."""
    from accelerate.hooks import attach_align_device_hook_on_blocks
    from accelerate.utils import OffloadedWeightsLoader

    model = load(directory)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    blocks = [f"{model.base_model_prefix}.layers.{i}" for i in range(model.config.num_hidden_layers)]
    attach_align_device_hook_on_blocks(
        model,
        execution_device=dict.fromkeys(blocks, torch.device("cpu")) | {"": torch.device("cpu")},
        offload=dict.fromkeys(blocks, True) | {"": False},
        weights_map=OffloadedWeightsLoader(state_dict=state),
        offload_buffers=False,
    )
    return model


def sequential_hooks(directory: Path, folder: Path) -> Any:
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = cpu_offload(load(directory), execution_device=torch.device("cpu"))
    for module in list(model.modules()):
        if getattr(module, "_hf_hook", None) is not None:
            add_hook_to_module(module, ModelHook(), append=True)
    return model


SET_UPS: dict[str, Callable[[Path, Path], Any]] = {
    f.__name__: f
    for f in (cpu_offload, disk_offload, dispatched, from_pretrained, gpu_replica, sequential_hooks)
}


class Snapshot:
    """All that an export must leave as it was: hooks, tensors, flags and what the model computes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # A forward pass puts new tensors into an offloaded model, so what it computes comes first.
        self.logits = logits(model)
        self.before = self._facts()

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for name, module in self.model.named_modules():
            hook = getattr(module, "_hf_hook", None)
            facts[f"{name}:hook"] = id(hook)
            facts[f"{name}:attributes"] = sorted(module.__dict__)
            facts[f"{name}:training"] = module.training
            # Quantizers keep the scales of their last call as plain attributes.
            facts[f"{name}:kept"] = {
                k: id(v) for k, v in module.__dict__.items() if isinstance(v, torch.Tensor)
            }
            facts[f"{name}:buffers"] = {k: id(v) for k, v in module._buffers.items()}
            facts[f"{name}:hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
            if getattr(hook, "weights_map", None) is not None:
                facts[f"{name}:map"] = id(hook.weights_map)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            version = tensor._version
            values = None if tensor.device.type == "meta" else tensor.detach().float().sum().item()
            facts[name] = (id(tensor), tensor.device, tensor.requires_grad, version, values)
        return copy.copy(facts)

    def check(self) -> None:
        assert self._facts() == self.before
        assert torch.equal(logits(self.model), self.logits)


@pytest.fixture(params=list(SET_UPS))
def set_up(request: pytest.FixtureRequest) -> Iterator[Callable[[Path, Path], Any]]:
    """A function (directory, folder) -> an offloaded model, in each way in turn."""
    yield SET_UPS[request.param]

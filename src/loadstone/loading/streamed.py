"""A model larger than memory: everything but its decoder layers is loaded, and layers come one at a time.

As in `native`, construction, renaming and conversion of weights are transformers' own, handed a part of our lazy
state dict. What would be passed over in silence is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loadstone.artifact.source import values_checked
from loadstone.errors import ArtifactError
from loadstone.loading.complete import CHECK_CONFIG, UNEXPECTED, ignored_keys
from loadstone.loading.experts import conversions_of, learn_experts
from loadstone.loading.layers import layer_stack
from loadstone.loading.lazy import lazy_state_dict
from loadstone.loading.loader import import_libraries
from loadstone.loading.meta import destinations, skeleton
from loadstone.loading.model_class import (
    construction,
    load_config,
    model_class_of,
    quiet_transformers,
    stored_dtype,
)
from loadstone.loading.plan import LoadPlan

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_REMEDY = "Finalize or copy the model again"


class StreamedModel:
    """``model`` with its decoder layers on the meta device, all else on ``device``; `layer` brings one in."""

    def __init__(self, plan: LoadPlan, device: torch.device, state: dict[str, Any]) -> None:
        import torch

        artifact = plan.artifact
        config = load_config(artifact, plan.trust_remote_code)
        dtype = stored_dtype(artifact, config) if plan.dtype == "auto" else getattr(torch, plan.dtype)
        self.device = device
        model_class = model_class_of(config, artifact, plan.trust_remote_code)
        with construction(artifact, model_class):
            self.model = skeleton(model_class, config, dtype).eval()
        learn_experts(self.model, state)
        self._where = artifact.weights.index or artifact.weights.files[0]
        self._options = _load_options(self.model, device, dtype)
        found = layer_stack(self.model)
        if found is None:
            raise ArtifactError(
                f"'{artifact.root}' has no list of decoder layers that could be streamed",
                "Leave --stream out, on a machine that holds the model",
            )
        stack, self.stack = found
        self.stack_name = stack
        self._parts: dict[int | None, dict[str, Any]] = {}
        places = destinations(self.model, list(state))
        unknown = [key for key, destination in places.items() if destination is None]
        ignored = ignored_keys(self.model, artifact.tensors, unknown)
        for key, destination in places.items():
            if key in ignored:
                continue
            if destination is None:
                raise ArtifactError(f"{self._where}: tensor '{key}' {UNEXPECTED}", CHECK_CONFIG)
            inside = destination.parameter.startswith(stack + ".")
            index = int(destination.parameter[len(stack) + 1 :].partition(".")[0]) if inside else None
            self._parts.setdefault(index, {})[key] = state[key]
        self._fill(None)
        self.model.tie_weights()
        outside = {id(p) for p in self.model.parameters()} - {id(p) for p in self.stack.parameters()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in outside and parameter.device.type == "meta":
                raise ArtifactError(f"{self._where}: tensor '{name}' is missing", _REMEDY)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def __len__(self) -> int:
        return len(self.stack)

    def layer(self, index: int) -> nn.Module:
        """Layer ``index`` with its weights on the device; they live as long as the module that is returned.

        Raises `ArtifactError` when a weight is missing or has another shape.
        """
        import torch

        empty = self.stack[index]
        # torchao's tensors cannot be made from inference tensors.
        with torch.inference_mode(False):
            self.stack[index] = copy.deepcopy(empty)
            try:
                self._fill(index)
                layer: nn.Module = self.stack[index]
            finally:
                self.stack[index] = empty
        for name, parameter in layer.named_parameters():
            if parameter.device.type == "meta":
                raise ArtifactError(f"{self._where}: '{name}' of layer {index} is missing", _REMEDY)
        return layer

    def _fill(self, part: int | None) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(
                model=self.model, state_dict=self._parts.get(part, {}), load_config=self._options
            )
        if info.mismatched_keys:
            name, stored, expected = sorted(info.mismatched_keys)[0]
            raise ArtifactError(
                f"{self._where}: tensor '{name}' has shape {list(stored)}, config.json asks for {list(expected)}",
                CHECK_CONFIG,
            )
        errors = [*info.error_msgs, *map(str, info.conversion_errors.values())]
        if errors:
            raise ArtifactError(f"{self._where}: {errors[0]}", _REMEDY)


@contextmanager
def streamed(plan: LoadPlan, device: torch.device) -> Iterator[StreamedModel]:
    """An artifact of a native load path for the length of a block, during which its files stay open.

    Raises `ArtifactError` for what cannot be streamed, and at the end for a weight that is not finite.
    """
    import torch

    import_libraries()
    artifact = plan.artifact
    quantized_dtype = None if plan.dtype == "auto" else getattr(torch, plan.dtype)
    with (
        torch.inference_mode(False),
        lazy_state_dict(artifact, quantized_dtype) as state,
        values_checked(artifact.source, artifact.packed.values()),
    ):
        yield StreamedModel(plan, device, state)


def _load_options(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers.modeling_utils import LoadStateDictConfig

    return LoadStateDictConfig(
        ignore_mismatched_sizes=True,
        device_map={"": str(device)},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=conversions_of(model),
    )

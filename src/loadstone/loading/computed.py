"""Tensors that a model's code computes as it is built and no checkpoint holds: rotary frequencies, masks, tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def computed_tensors() -> Iterator[None]:
    """Within the block, `from_pretrained` leaves buffers that are not saved, and plain tensors, as the code made them.

    It builds models on the meta device, without values, and then gives buffers memory that only `_init_weights` fills:
    transformers' own classes do that; code that came with a model and was written for transformers 4 does not, and
    would compute with whatever was in memory. To be used under `model_class.BUILDING`.
    """
    from transformers import PreTrainedModel

    move = PreTrainedModel._move_missing_keys_from_meta_to_device

    def moved(model: PreTrainedModel, *arguments: Any) -> None:
        move(model, *arguments)
        # `_init_weights`, which comes next, may compute them anew.
        _fill(model)

    PreTrainedModel._move_missing_keys_from_meta_to_device = moved
    try:
        yield
    finally:
        PreTrainedModel._move_missing_keys_from_meta_to_device = move


def _fill(model: PreTrainedModel) -> None:
    from torch import Tensor

    from loadstone.loading.meta import skeleton

    saved = model.state_dict().keys()
    built = skeleton(type(model), model.config, model.dtype)
    for name, module in built.named_modules():
        mine = model.get_submodule(name)
        for key, tensor in module._buffers.items():
            placed = mine._buffers.get(key)
            own = f"{name}.{key}".removeprefix(".")
            if tensor is None or placed is None or own in saved:
                continue
            if tensor.device.type == "meta":
                raise ArtifactError(
                    f"'{own}' is computed from weights as the model is built, before they are loaded",
                    "Ask whoever wrote the model's code to compute it in its forward pass",
                )
            mine._buffers[key] = tensor.to(placed.device)
        for key, tensor in vars(module).items():
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                setattr(mine, key, tensor.to(model.device))

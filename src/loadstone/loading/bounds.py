"""What a config may ask for before anything is built from it: sizes that the stored tensors can fill, no code from
elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keys that say how many modules, or labels, are made: everything else costs nothing on the meta device.
_LAYERS = re.compile(r"(.*_)?(layers?|depths?|blocks?|stages)")
_WIDE = re.compile(r"(num_labels|num_.*experts|n_.*experts)")
# Elements that a model may make of itself whatever is stored: masks, positions.
_FREE = 1 << 26
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def check_config(artifact: Artifact, trust_remote_code: bool = False) -> None:
    """Raise `ArtifactError` for a config that cannot be of the stored tensors, or that names code on the hub.

    A layer has at least one tensor (four layers may share one); experts and labels are rows of a tensor.
    """
    tensors = artifact.tensors
    most = {
        _LAYERS: max(1024, 4 * len(tensors)),
        _WIDE: max(65_536, max((max(info.shape, default=0) for info in tensors.values()), default=0)),
    }
    for key, value in _entries(artifact.config):
        for names, limit in most.items():
            numbers = value if isinstance(value, list) else [value]
            if names.fullmatch(key) and any(type(n) is int and n > limit for n in numbers):
                raise ArtifactError(
                    f"{artifact.config_dir}/config.json: {key} asks for more than the {len(tensors)} stored tensors "
                    "can be",
                    "Check that config.json is of these weights",
                )
        if key in _ATTENTION and not trust_remote_code:
            for name in value.values() if isinstance(value, dict) else [value]:
                if isinstance(name, str) and "/" in name:
                    raise ArtifactError(
                        f"{artifact.config_dir}/config.json: {key} asks to fetch and run the kernel {ascii(name)[:80]}",
                        "Remove it, or pass --trust-remote-code if you trust that kernel",
                    )


@contextmanager
def bounded(artifact: Artifact) -> Iterator[None]:
    """Within the block, a load that would make more of a model than the artifact can hold raises `ArtifactError`.

    What a checkpoint lacks, or has in another shape, is initialised by transformers before it is reported: a config
    that asks for a vocabulary of a billion tokens would fill the memory. To be used under `model_class.BUILDING`.
    """
    from transformers import PreTrainedModel

    move = PreTrainedModel._move_missing_keys_from_meta_to_device
    most = max(_FREE, 4 * sum(info.numel for info in artifact.tensors.values()))

    def checked(model: PreTrainedModel, missing: Any, *rest: Any) -> None:
        left = set(missing) - model.all_tied_weights_keys.keys()
        sizes = {name: model.get_parameter_or_buffer(name).numel() for name in left}
        sizes |= {name: buffer.numel() for name, buffer in model.named_non_persistent_buffers()}
        if sum(sizes.values()) > most:
            name = max(sizes, key=lambda n: sizes[n])
            raise ArtifactError(
                f"{artifact.config_dir}/config.json: asks for {sizes[name]:,} values of '{name}', which are not stored",
                "Check that config.json is of these weights",
            )
        move(model, missing, *rest)

    PreTrainedModel._move_missing_keys_from_meta_to_device = checked
    try:
        yield
    finally:
        PreTrainedModel._move_missing_keys_from_meta_to_device = move


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    left: list[Any] = [config]
    while left:
        for key, value in left.pop().items():
            yield key, value
            if isinstance(value, dict):
                left.append(value)

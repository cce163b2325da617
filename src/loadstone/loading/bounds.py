"""What a config may ask for before anything is built from it: sizes that the stored tensors can fill, no code from
elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from loadstone.artifact import Artifact
from loadstone.errors import ArtifactError

# Keys that say how many modules, or labels, are made: everything else costs nothing on the meta device.
_LAYERS = re.compile(r"(num_.*layers|n_layers?|depth|depths|layers)")
_WIDE = re.compile(r"(num_labels|num_.*experts|n_.*experts)")
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


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    left: list[Any] = [config]
    while left:
        for key, value in left.pop().items():
            yield key, value
            if isinstance(value, dict):
                left.append(value)

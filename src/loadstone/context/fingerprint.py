"""Fingerprint of a base model: a hash of every tensor, by which a context recognises the weights it was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadstone.artifact.context_errors import ArchitectureMismatch, BaseMismatch
from loadstone.artifact.torchao.flatten import plain_parts, tensor_bytes
from loadstone.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Names listed in an error message.
_NAMED = 5
# Threads: hashlib releases the GIL.
_HASHERS = 4


@dataclass(frozen=True)
class Fingerprint:
    """``tensors`` maps each parameter and saved buffer to (dtype, shape, sha256 of its bytes)."""

    tensors: dict[str, tuple[str, tuple[int, ...], str]]

    @property
    def digest(self) -> str:
        """One sha256 over all of it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, list[Any]]:
        return {name: [dtype, list(shape), sha] for name, (dtype, shape, sha) in sorted(self.tensors.items())}

    @classmethod
    def from_json(cls, tensors: dict[str, list[Any]]) -> Fingerprint:
        return cls({name: (str(d), tuple(shape), str(sha)) for name, (d, shape, sha) in tensors.items()})


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model in memory, on any device.

    Quantized tensors count with each of the plain tensors they consist of. Raises `UsageError` for a model that is
    partly offloaded: its values are not in memory.
    """
    return fingerprint_of(model.state_dict())


def fingerprint_of(state: Mapping[str, Tensor]) -> Fingerprint:
    """The fingerprint of named tensors. Several are hashed at once: one core reads half a gigabyte a second."""
    parts = {part: plain for name, tensor in state.items() for part, plain in plain_parts(name, tensor)}
    for part, plain in parts.items():
        if plain.is_meta:
            raise UsageError(
                f"'{part}' is offloaded, and contexts need the whole base in memory",
                "Use a device that holds the model",
            )
    # Tied parameters are hashed once; empty ones share an address with anything.
    keys = {
        part: (t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else part
        for part, t in parts.items()
    }
    unique = {key: parts[part] for part, key in keys.items()}
    with ThreadPoolExecutor(_HASHERS) as pool:
        digests = dict(zip(unique, pool.map(tensor_sha256, unique.values()), strict=True))
    return Fingerprint(
        {
            part: (str(t.dtype).removeprefix("torch."), tuple(t.shape), digests[keys[part]])
            for part, t in parts.items()
        }
    )


def tensor_sha256(tensor: Tensor) -> str:
    """Hex sha256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def check_same(wanted: Fingerprint, found: Fingerprint, base: str) -> None:
    """Raise `ArchitectureMismatch` or `BaseMismatch`, naming parameters, unless ``found`` is ``wanted``."""
    remedy = "Name the model the context was fitted with (--base, or base=), or fit again"
    missing = [name for name in wanted.tensors if name not in found.tensors]
    unexpected = [name for name in found.tensors if name not in wanted.tensors]
    if missing or unexpected:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has besides {_some(unexpected)}"] * bool(
            unexpected
        )
        raise BaseMismatch(f"the base model '{base}' {' and '.join(parts)}", remedy)
    shapes = [n for n, t in wanted.tensors.items() if found.tensors[n][1] != t[1]]
    if shapes:
        name = shapes[0]
        raise ArchitectureMismatch(
            f"the base model '{base}' has another shape in {_some(shapes)}: "
            f"{list(found.tensors[name][1])}, fitted with {list(wanted.tensors[name][1])}",
            remedy,
        )
    dtypes = [n for n, t in wanted.tensors.items() if found.tensors[n][0] != t[0]]
    if dtypes:
        name = dtypes[0]
        raise BaseMismatch(
            f"the base model '{base}' is in {found.tensors[name][0]}, the context was fitted in "
            f"{wanted.tensors[name][0]}",
            "Load the base in that dtype, or fit again",
        )
    values = [n for n, t in wanted.tensors.items() if found.tensors[n][2] != t[2]]
    if values:
        raise BaseMismatch(f"the base model '{base}' has other values in {_some(values)}", remedy)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown

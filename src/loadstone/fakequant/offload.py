"""The data of a live model's tensors, wherever accelerate put them; reading only: no hook runs, nothing
moves."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    import torch


def data_of(model: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The values of ``tensor``, called ``name`` in the state dict of ``model``, on the CPU in its own
    dtype.

    A meta tensor is looked up in accelerate's hooks from its own module outwards: the nearest hook that has
    it wins. Raises `ArtifactError` with the name when none has it, when what a hook has is of another shape
    or dtype, and when there is a hook of an unknown kind.
    """
    import torch

    if getattr(tensor, "ds_id", None) is not None and tensor.numel() == 0:
        raise ArtifactError(
            f"tensor '{name}' is partitioned by DeepSpeed", "Gather the model, or export its directory"
        )
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise ArtifactError(
            f"tensor '{name}' is a {type(tensor).__name__}, not a plain tensor",
            "Export the unquantized model",
        )
    if tensor.device.type != "meta":
        return tensor.detach().cpu()
    unknown: list[str] = []
    for module, local, own in _owners(model, name):
        for hook in _hooks(module, unknown):
            # A hook on a parent answers for what lies below it only when it was placed for that.
            if hook.weights_map is None or not (own or hook.place_submodules):
                continue
            try:
                found = hook.weights_map[local]
            except KeyError:
                continue
            except OSError as error:
                raise ArtifactError(
                    f"tensor '{name}' is offloaded to a file that cannot be read ({error})",
                    "Load the model again",
                ) from None
            return _checked(name, found, tensor)
    if unknown:
        raise ArtifactError(
            f"tensor '{name}' is on the meta device under a {unknown[0]}, an offload hook of an unknown kind",
            "Remove the hook, or export the model's directory",
        )
    raise ArtifactError(
        f"tensor '{name}' is on the meta device and no offload hook has its data",
        "Load the model again, or export its directory",
    )


def return_memory() -> None:
    """Give freed memory back to the system. glibc keeps chunks of a few MB that lie between others in use; layers that
    come and go one by one can leave a good part of the model that way."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _owners(model: Any, name: str) -> Iterator[tuple[Any, str, bool]]:
    """Modules that may hold ``name``, innermost first: (module, name within it, whether it is its own)."""
    parts = name.split(".")
    modules = [model]
    for part in parts[:-1]:
        inner = modules[-1]._modules.get(part)
        if inner is None:
            break
        modules.append(inner)
    for depth in range(len(modules) - 1, -1, -1):
        yield modules[depth], ".".join(parts[depth:]), depth == len(modules) - 1


def _hooks(module: Any, unknown: list[str]) -> Iterator[Any]:
    """The offloading hooks of a module, those in a sequence one by one, the last added first; the classes of
    others go to ``unknown``."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    waiting = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop()
        if isinstance(hook, SequentialHook):
            waiting.extend(hook.hooks)
        elif isinstance(hook, AlignDevicesHook):
            yield hook
        elif hook is not None:
            unknown.append(type(hook).__name__)


def _checked(name: str, found: Any, tensor: torch.Tensor) -> torch.Tensor:
    if found is None or found.device.type == "meta":
        raise ArtifactError(f"tensor '{name}': its offload hook has no data", "Load the model again")
    if found.shape != tensor.shape or found.dtype != tensor.dtype:
        raise ArtifactError(
            f"tensor '{name}' is {tensor.dtype} {list(tensor.shape)} and its offload hook has {found.dtype} "
            f"{list(found.shape)}",
            "Load the model again",
        )
    return found.detach().cpu()

"""Finding the model a context was fitted with: given, recorded, built in or already loaded. Never downloaded."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from loadstone.artifact.builtin import PREFIX, builtin_names
from loadstone.artifact.detect import PFN as PFN_KIND
from loadstone.artifact.detect import detect
from loadstone.context.fingerprint import Fingerprint, check_same, fingerprint
from loadstone.context.pfn.model import PFN
from loadstone.errors import MissingError, UsageError

if TYPE_CHECKING:
    from loadstone.artifact import Artifact

log = logging.getLogger(__name__)

# One model for all contexts of one base: (directory, newest change, device, dtype) -> model, while someone holds it.
_LOADED: WeakValueDictionary[tuple[Any, ...], PFN] = WeakValueDictionary()
_LOCK = threading.Lock()


def load_base(path: str | Path, *, device: str = "auto", dtype: str = "float32") -> PFN:
    """A PFN from its directory or ``builtin:`` name; asked for again, the same object while it is in use.

    Raises `UsageError` when the directory holds another kind of model, and the loader's errors.
    """
    from loadstone.context.pfn.load import load_pfn
    from loadstone.loading import plan
    from loadstone.loading.placement import resolve_device

    artifact = detect(path)
    _check_kind(artifact)
    device_map = resolve_device(device, artifact)
    where = "cpu" if device_map is None else str(device_map[""])
    key = (artifact.path.resolve(), artifact.stamp, where, dtype)
    with _LOCK:
        model = _LOADED.get(key)
        if model is None:
            loaded: Any = load_pfn(plan(artifact, device=where))
            model = _LOADED[key] = loaded.to(getattr(torch, dtype))
        model.source = str(path) if str(path).startswith(PREFIX) else str(artifact.path.resolve())
    return model


def find_base(recorded: str | None, wanted: Fingerprint, *, context: Path, device: str, dtype: str) -> PFN:
    """The base of a context when the caller names none: its recorded place, what is built in, what is loaded.

    Raises `MissingError` when none of these fits, or the mismatch itself when the recorded place holds other weights.
    """
    with _LOCK:
        loaded = [model for (_, _, where, kind), model in _LOADED.items() if (where, kind) == (device, dtype)]
    if recorded:
        places = [recorded] if recorded.startswith(PREFIX) else [Path(recorded), context / recorded]
        for place in places:
            if str(place).startswith(PREFIX) or Path(place).is_dir():
                model = load_base(place, device=device, dtype=dtype)
                check_same(wanted, fingerprint(model), str(place))
                return model
    for name in builtin_names():
        if detect(PREFIX + name).kind != PFN_KIND:
            continue
        candidate = load_base(PREFIX + name, device=device, dtype=dtype)
        if fingerprint(candidate) == wanted:
            return candidate
    for candidate in loaded:
        if fingerprint(candidate) == wanted:
            return candidate
    raise MissingError(
        f"the base model of '{context}' is not here: it was '{recorded}', fingerprint {wanted.digest[:16]}",
        "Name its directory (--base DIR, or base=)",
    )


def _check_kind(artifact: Artifact) -> None:
    if artifact.kind != PFN_KIND:
        raise UsageError(
            f"'{artifact.root}' is {artifact.kind}, and contexts are fitted with in-context models (PFN)",
            f"Name such a model, such as {PREFIX}tiny-pfn",
        )

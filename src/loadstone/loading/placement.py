"""Where the modules of a model go: one device, or spread over GPUs, CPU and disk when it does not fit."""

from __future__ import annotations

from typing import Any

from loadstone.artifact import Artifact
from loadstone.artifact.detect import OTHER_QUANTIZER
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES
from loadstone.errors import MissingError
from loadstone.loading.devices import CPU, DISK, cuda_map
from loadstone.loading.meta import meta_model
from loadstone.loading.model_class import load_config, stored_dtype


def resolve_device(device: str, artifact: Artifact, dtype: str = "auto") -> Any:
    """The ``device_map`` for `from_pretrained`: None for the CPU, ``{"": "cuda:0"}``, or a module-to-device map.

    ``auto`` is the first GPU when the weights, in ``dtype``, fit its free memory with a tenth to spare, the CPU when
    there is no GPU and they fit there, and accelerate's split over GPUs, CPU and disk otherwise (``"auto"`` where
    only transformers' own loader knows the model's parts). Raises `MissingError` for CUDA that is not there.
    """
    if device == CPU:
        return None
    if device != "auto":
        return cuda_map(device)
    from accelerate.utils import get_max_memory

    free: dict[Any, int] = get_max_memory()
    need = weight_bytes(artifact, dtype) * 1.1
    if 0 in free and need < free[0]:
        return {"": "cuda:0"}
    if 0 not in free and need < free[CPU]:
        return None
    if artifact.kind == OTHER_QUANTIZER or artifact.needs_remote_code:
        return "auto"
    return split_map(artifact, free, dtype)


def split_map(artifact: Artifact, max_memory: dict[Any, int], dtype: str = "auto") -> dict[str, Any]:
    """accelerate's device map under ``max_memory`` (bytes by GPU number, ``cpu``); raises when it cannot be kept.

    Quantized weights are sized as one byte a value. They can be moved between GPU and CPU and cannot be mapped from
    disk, and neither can distributed checkpoints: an artifact that would need the disk is then refused.
    """
    import torch
    from accelerate import infer_auto_device_map

    model = meta_model(artifact)
    model.tie_weights()
    device_map = infer_auto_device_map(
        model,
        max_memory=max_memory,
        no_split_module_classes=sorted(model._no_split_modules or ()),
        dtype=stored_dtype(artifact, load_config(artifact)) if dtype == "auto" else getattr(torch, dtype),
        special_dtypes=dict.fromkeys(artifact.quantized, torch.int8),
    )
    if DISK in device_map.values():
        _check_mappable(artifact, max_memory)
    return device_map


def _check_mappable(artifact: Artifact, max_memory: dict[Any, int]) -> None:
    """Raise `MissingError` for weights that accelerate cannot map from the disk."""
    have = ", ".join(f"{k}: {v / 1e9:.1f} GB" for k, v in max_memory.items())
    size = f"'{artifact.root}' ({weight_bytes(artifact) / 1e9:.1f} GB) does not fit here ({have})"
    if artifact.is_torchao:
        raise MissingError(
            f"{size}, and quantized tensors cannot be offloaded to disk",
            "Use a machine with more memory, or the unquantized source",
        )
    if artifact.packed:
        raise MissingError(
            f"{size}, and packed weights cannot be mapped from disk",
            "Finalize it without --quantize, which writes its decoded weights, and load the result",
        )
    if not artifact.source.mappable:
        raise MissingError(
            f"{size}, and a training run's own checkpoint format cannot be mapped from disk",
            "Finalize it without --quantize, which needs little memory, and load the result",
        )


def weight_bytes(artifact: Artifact, dtype: str = "auto") -> int:
    """Bytes of all weights once loaded: plain ones in ``dtype`` (auto: as stored), quantized ones as stored or, where
    they are decoded, in ``dtype`` (auto: two bytes)."""
    parts = [part for flat in artifact.quantized.values() for part in flat.parts.values()]
    quantized = {part.name for part in parts}
    quantized |= {part.name for weight in artifact.packed.values() for part in weight.parts.values()}
    decoded = sum(weight.numel for weight in artifact.packed.values()) * (4 if dtype == "float32" else 2)
    width = {"float32": 32, "bfloat16": 16, "float16": 16}.get(dtype)
    plain = [info for info in artifact.tensors.values() if info.name not in quantized]
    return (
        decoded
        + sum(part.nbytes for part in parts)
        + sum(
            info.numel * width // 8 if width and info.dtype in FLOAT_DTYPES else info.nbytes for info in plain
        )
    )

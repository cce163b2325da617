"""Which tensors a context has, before any exists: what a fit will need, and what a file must hold."""

from __future__ import annotations

import torch

from loadstone.artifact import TensorInfo
from loadstone.artifact.torchao.flatten import dtype_name
from loadstone.context.pfn.config import PFNConfig
from loadstone.context.pfn.layer_cache import CACHE_DTYPES
from loadstone.context.tables.predictions import REGRESSION

PROBE_ROWS = 16
CACHE_DTYPE_NAMES = {dtype: name for name, dtype in CACHE_DTYPES.items()}


def context_tensors(
    config: PFNConfig,
    *,
    task: str,
    rows: int,
    features: int,
    classes: int,
    cache: torch.dtype,
    model: torch.dtype,
) -> dict[str, TensorInfo]:
    """Name, dtype and shape of every tensor that a context of these sizes stores (offsets are not meaningful)."""
    found: dict[str, TensorInfo] = {}

    def add(name: str, dtype: torch.dtype, *shape: int) -> None:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        found[name] = TensorInfo(name, dtype_name(dtype), shape, "", 0, nbytes)

    add("scaler.mean", torch.float64, 1, features)
    add("scaler.std", torch.float64, 1, features)
    add("codes", torch.float32, features, config.code_size)
    if task == REGRESSION:
        add("target.mean", torch.float64, 1, 1)
        add("target.std", torch.float64, 1, 1)
    size = config.width // config.heads
    for number in range(config.layers):
        # The last layer's answer is read off the target's token, so only that column is kept.
        tokens = 1 if number == config.layers - 1 else config.tokens(features)
        for name in ("key", "value"):
            add(f"layers.{number}.{name}s", cache, tokens, config.heads, rows, size)
            if cache == torch.int8:
                add(f"layers.{number}.{name}_scale", torch.float32, tokens, config.heads, 1, size)
    outputs = config.bars if task == REGRESSION else classes
    add("probe.queries", torch.float64, PROBE_ROWS, features)
    add("probe.logits", model, PROBE_ROWS, outputs)
    return found


def total_bytes(tensors: dict[str, TensorInfo]) -> int:
    """Bytes of all the tensors together: the context in memory, and its file but for the header."""
    return sum(tensor.nbytes for tensor in tensors.values())

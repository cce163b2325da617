"""Weights that other quantizers stored (FP8, MXFP4, GPTQ, AWQ, …), from config blocks and headers."""

from loadstone.artifact.packed.read import (
    METHODS,
    MODELOPT,
    method_of,
    modelopt_block,
    not_decoded,
    read_packed,
)
from loadstone.artifact.packed.weight import Packed, StoredWeight

__all__ = [
    "METHODS",
    "MODELOPT",
    "Packed",
    "StoredWeight",
    "method_of",
    "modelopt_block",
    "not_decoded",
    "read_packed",
]

"""MXFP4 as gpt-oss stores its experts: ``X_blocks`` (e2m1, two values a byte) and ``X_scales`` (powers of two).

Blocks are (experts, out, groups, 16 bytes), scales (experts, out, groups); the parameter is (experts, in, out).
"""

from __future__ import annotations

from typing import Any

from loadstone.artifact.compressed_tensors.scheme import MXFP4, LayerScheme, QuantArgs
from loadstone.artifact.files import Sink
from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.artifact.packed.weight import StoredWeight, misfit
from loadstone.errors import ArtifactError

# Values and bytes of a group that shares a scale.
GROUP, GROUP_BYTES = 32, 16
_SCHEME = LayerScheme(MXFP4, QuantArgs(4, "float", "group", GROUP))


def mxfp4_weights(
    block: dict[str, Any], tensors: dict[str, TensorInfo], sink: Sink
) -> dict[str, StoredWeight]:
    """Every parameter that is stored as blocks and scales. Problems go to ``sink``, naming the tensor."""
    found: dict[str, StoredWeight] = {}
    for name, blocks in tensors.items():
        if not name.endswith("_blocks"):
            continue
        parameter = name.removesuffix("_blocks")
        try:
            found[parameter] = _weight(parameter, blocks, tensors.get(f"{parameter}_scales"))
        except ArtifactError as error:
            sink(error)
    return found


def _weight(parameter: str, blocks: TensorInfo, scales: TensorInfo | None) -> StoredWeight:
    if scales is None:
        raise misfit(blocks, f"has no scales ({parameter}_scales)")
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != GROUP_BYTES or 0 in blocks.shape:
        raise misfit(
            blocks, f"is {blocks.dtype} {list(blocks.shape)}, blocks are U8 (experts, out, groups, 16)"
        )
    if scales.dtype not in ("U8", "F8_E8M0") or scales.shape != blocks.shape[:3]:
        raise misfit(
            scales, f"is {scales.dtype} {list(scales.shape)}, its blocks take U8 {list(blocks.shape[:3])}"
        )
    experts, out, groups, _ = blocks.shape
    shape = (experts, groups * GROUP, out)
    # A row of the parameter holds one value of each stored row: an expert is decoded at once.
    heights = {"weight_packed": shape[1], "weight_scale": shape[1]}
    parts = {"weight_packed": blocks, "weight_scale": scales}
    return StoredWeight(parameter, _SCHEME, parts, shape, heights, "weight_packed")

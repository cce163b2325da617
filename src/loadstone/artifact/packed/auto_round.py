"""auto-round's own format: the bytes of GPTQ, AWQ, float8 or compressed-tensors, by what ``packing_format`` names.

Layers may differ in bits and groups; their tensors tell. Read in auto-round 0.16 (``export/``), which names:
``auto_round:auto_gptq`` (zero points less one), ``auto_round`` and ``auto_round:gptqmodel`` (as they are),
``auto_round:auto_awq``, ``auto_round:llm_compressor`` (MXFP4, MXFP8, NVFP4), ``auto_round:fp8…`` or nothing (FP8).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadstone.artifact.compressed_tensors import Group, LayerScheme, packed_weights
from loadstone.artifact.compressed_tensors.block import Block
from loadstone.artifact.compressed_tensors.scheme import MXFP4, MXFP8, NVFP4, QuantArgs
from loadstone.artifact.files import Sink
from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.artifact.packed.fp8 import fp8_weights
from loadstone.artifact.packed.integers import FIRST_VERSION, integer_weights
from loadstone.artifact.packed.weight import Packed

_GPTQ = {
    "auto": FIRST_VERSION,
    "auto_round:gptq": FIRST_VERSION,
    "auto_round:auto_gptq": FIRST_VERSION,
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
}
_AWQ = ("auto_round:awq", "auto_round:auto_awq")
_FLOAT = "auto_round:llm_compressor"
_SCHEMES = {
    MXFP4: LayerScheme(MXFP4, QuantArgs(4, "float", "group", 32)),
    MXFP8: LayerScheme(MXFP8, QuantArgs(8, "float", "group", 32)),
    NVFP4: LayerScheme(NVFP4, QuantArgs(4, "float", "tensor_group", 16)),
}


def unsupported_auto_round(block: dict[str, Any]) -> str:
    """What a block of auto-round's asks for that is not decoded here; empty where all is."""
    packing, kind = block.get("packing_format"), str(block.get("data_type", "int"))
    if block.get("rotation_config") or block.get("spinquant_config"):
        return "auto-round's rotated weights"
    if _is_fp8(block):
        return ""
    if packing == _FLOAT:
        return "" if kind.startswith(("mx_fp", "nv_fp")) else f"auto-round's data type {ascii(kind)[:40]}"
    if not isinstance(packing, str) or packing not in (*_GPTQ, *_AWQ):
        return f"auto-round's packing_format {ascii(packing)[:60]}"
    if kind != "int":
        return f"auto-round's data type {ascii(kind)[:40]} in {packing}"
    inputs, bits = block.get("act_bits") or 16, block.get("bits")
    if not isinstance(inputs, int) or inputs <= 8:
        return f"auto-round's {packing} with quantized inputs"
    return f"AWQ of {ascii(bits)[:20]} bits" if packing in _AWQ and bits != 4 else ""


def auto_round_weights(
    block: dict[str, Any], tensors: dict[str, TensorInfo], sink: Sink
) -> Mapping[str, Packed]:
    """Every quantized weight by its parameter's name. Problems go to ``sink``, naming the tensor."""
    packing = block.get("packing_format")
    if _is_fp8(block):
        return fp8_weights({"weight_block_size": block.get("weight_block_size")}, tensors, sink)
    if packing == _FLOAT:
        groups: dict[str, list[str]] = {}
        for name, scale in tensors.items():
            if name.endswith(".weight_scale"):
                module = name.removesuffix(".weight_scale")
                kind = MXFP4 if f"{module}.weight_packed" in tensors else MXFP8
                groups.setdefault(NVFP4 if scale.dtype == "F8_E4M3" else kind, []).append(module)
        found = tuple(Group(kind, tuple(names), _SCHEMES[kind]) for kind, names in groups.items())
        return packed_weights(Block(found), tensors, sink)
    extra = block.get("extra_config")
    layers: dict[str, Any] = extra if isinstance(extra, dict) else {}

    def settings(module: str, bits: int) -> dict[str, Any]:
        own = layers.get(module)
        given = block | (own if isinstance(own, dict) else {})
        if packing in _AWQ:
            return given | {"quant_method": "awq", "bits": bits}
        return given | {"bits": bits, "desc_act": False, "checkpoint_format": _GPTQ[str(packing)]}

    return integer_weights(settings, tensors, sink)


def _is_fp8(block: dict[str, Any]) -> bool:
    """Whether weights are float8 with scales of blocks, rows or tensors."""
    named = str(block.get("packing_format") or "auto_round:fp8").startswith("auto_round:fp8")
    return named and str(block.get("data_type", "int")).startswith("fp")

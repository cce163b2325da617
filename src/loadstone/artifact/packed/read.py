"""Which quantizers' weights are decoded here, and their weights in a directory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loadstone.artifact.compressed_tensors import packed_weights, read_block
from loadstone.artifact.compressed_tensors.block import METHOD, obsolete, unsupported
from loadstone.artifact.compressed_tensors.tensors import stored_shape
from loadstone.artifact.files import Sink, is_file, read_json
from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.artifact.hints import MODELOPT_REMEDY
from loadstone.artifact.packed.weight import Packed
from loadstone.errors import ArtifactError

MODELOPT, MODELOPT_FILE = "modelopt", "hf_quant_config.json"
BITSANDBYTES = "bitsandbytes"
# ModelOpt's names of number formats whose weights are value x scale.
_MODELOPT_ALGORITHMS = ("FP8", "NVFP4")

# What a `quantization_config` may name, and is decoded here.
METHODS = (METHOD, "fp8", "mxfp8", "fbgemm_fp8", MODELOPT, "mxfp4", "gptq", "awq", "auto-round", BITSANDBYTES)


def method_of(block: Any) -> str | None:
    """The quantizer that a ``quantization_config`` names; None where it names none."""
    if not isinstance(block, dict):
        return None
    if block.get("load_in_8bit") is True or block.get("load_in_4bit") is True:
        # Blocks from before quant_method existed.
        return BITSANDBYTES
    method = block.get("quant_method")
    return method if isinstance(method, str) else None


def not_decoded(block: Any) -> str:
    """What a ``quantization_config`` of one of the `METHODS` asks for that is not decoded here; empty where all is."""
    method = method_of(block)
    if method == METHOD:
        return unsupported(block)
    # The readers of a format are imported where it is named: most directories name none.
    if method in ("gptq", "awq"):
        from loadstone.artifact.packed.integers import unsupported_integers

        return unsupported_integers(block)
    if method == "auto-round":
        from loadstone.artifact.packed.auto_round import unsupported_auto_round

        return unsupported_auto_round(block)
    return ""


def read_packed(
    directory: Path, block: Any, tensors: dict[str, TensorInfo], sink: Sink
) -> Mapping[str, Packed]:
    """The quantized weights that ``block``, a ``quantization_config``, is about; empty for what is not decoded here.

    Problems of single weights go to ``sink``. Raises `ArtifactError` where nothing is quantized.
    """
    method = method_of(block)
    if method not in METHODS or not isinstance(block, dict):
        return {}
    found: Mapping[str, Packed]
    if method == METHOD and (reason := obsolete(block)):
        raise ArtifactError(
            f"config.json: quantization_config (compressed-tensors) has {reason}, which no release of the package "
            "that transformers takes today reads",
            "Decompress it with the release that wrote it, or quantize the model again",
        )
    if not_decoded(block):
        return {}
    if method == METHOD:
        found = packed_weights(read_block(block), tensors, sink, partial(stored_shape, directory))
    elif method in ("gptq", "awq"):
        from loadstone.artifact.packed.integers import integer_weights, settings_of

        found = integer_weights(settings_of(block), tensors, sink)
    elif method == BITSANDBYTES:
        from loadstone.artifact.packed.bitsandbytes import bitsandbytes_weights, read_bytes

        found = bitsandbytes_weights(partial(read_bytes, directory), tensors, sink)
    elif method == "auto-round":
        from loadstone.artifact.packed.auto_round import auto_round_weights

        found = auto_round_weights(block, tensors, sink)
    elif method == "mxfp4":
        from loadstone.artifact.packed.mxfp4 import mxfp4_weights

        found = mxfp4_weights(block, tensors, sink)
    else:
        from loadstone.artifact.packed.fp8 import fp8_weights

        if method == MODELOPT:
            _check_modelopt(block, tensors)
            # Blocks of ModelOpt's do not name a size: scales belong to a tensor or to rows.
            block = block | {"weight_block_size": None}
        found = fp8_weights(block, tensors, sink)
    if not found:
        raise ArtifactError(
            f"config.json says {method}, and no tensor is quantized",
            "If the weights were merged or decoded, remove quantization_config; else make the artifact again",
        )
    return found


def modelopt_block(directory: Path) -> dict[str, Any] | None:
    """ModelOpt's own file as a ``quantization_config``, for a config.json without one; None where there is no file."""
    if not is_file(directory / MODELOPT_FILE):
        return None
    found = read_json(directory / MODELOPT_FILE).get("quantization")
    return {"quant_method": MODELOPT} | (found if isinstance(found, dict) else {})


def _check_modelopt(block: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    named, layers = [block.get("quant_algo")], block.get("quantized_layers")
    if named == ["MIXED_PRECISION"] and isinstance(layers, dict) and layers:
        named = [layer.get("quant_algo") if isinstance(layer, dict) else layer for layer in layers.values()]
    others = [algorithm for algorithm in named if algorithm not in _MODELOPT_ALGORITHMS]
    if others:
        raise ArtifactError(
            f"config.json: ModelOpt's quantization {ascii(others[0])[:60]} is not decoded here",
            MODELOPT_REMEDY,
        )
    scaled = next((name for name in tensors if name.endswith("pre_quant_scale")), None)
    if scaled is not None:
        raise ArtifactError(
            f"{tensors[scaled].file}: '{scaled}' scales inputs, which a plain weight has no place for",
            MODELOPT_REMEDY,
        )

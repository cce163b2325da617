"""Infer the kind of an artifact from config.json, then from the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadstone.artifact.files import Sink, is_file
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.artifact.formats.weights import WeightFiles
from loadstone.artifact.hints import MLX_REMEDY, MODELOPT_REMEDY, mlx_block, wrapped_names
from loadstone.artifact.packed import MODELOPT, Packed, method_of
from loadstone.artifact.source import Source
from loadstone.artifact.torchao.checks import FlatTensor
from loadstone.artifact.torchao.config import check_agreement, check_block, chooses_by_module
from loadstone.artifact.torchao.uniform import check_layers, check_quantized
from loadstone.errors import ArtifactError

ADAPTER = "adapter"
DENSE = "dense"
TORCHAO = "torchao"
TORCHAO_UNMARKED = "torchao-unmarked"
COMPRESSED_TENSORS = "compressed-tensors"
QAT = "qat"
OTHER_QUANTIZER = "other-quantizer"
FAKEQUANT = "fakequant"
CONTEXT = "context"
PFN = "pfn"
UNKNOWN = "unknown"
ADAPTER_CONFIG = "adapter_config.json"

# Key in config.json (or loadstone.json) under which a QAT run records its fake-quantization recipe.
QAT_KEY = "loadstone_qat"

# model_type of the in-context models that loadstone defines itself.
PFN_TYPE = "loadstone-pfn"

Verdict = tuple[str, tuple[str, ...], str | None]

# Names that other quantizers give to what they store beside or instead of a weight.
_LEFTOVERS = {
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".g_idx": "gptq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or fp8",
    ".weight_scale_inv": "fp8",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}
_LEFTOVER_SUFFIXES = tuple(_LEFTOVERS)


def classify(
    directory: Path,
    config: dict[str, Any],
    weights: WeightFiles,
    source: Source,
    sink: Sink,
    packed: Mapping[str, Packed],
) -> Verdict:
    """(kind, evidence, quantization method).

    Problems go to ``sink``, and `UNKNOWN` means one of them decided it.
    """
    if config.get("model_type") == PFN_TYPE:
        return PFN, (f"config.json: model_type is {PFN_TYPE}",), None
    tensors, flat = source.tensors, source.quantized
    try:
        for problem in source.foreign:
            raise problem
        if quantization_block(config) is not None:
            return _from_block(config, weights, tensors, flat, sink, packed)
    except ArtifactError as error:
        sink(error)
        return UNKNOWN, (), None
    if (wrapped := wrapped_names(tensors)) is not None:
        sink(wrapped)
        return UNKNOWN, (), None
    check_layers(tensors, sink)
    if flat:
        check_quantized(flat, tensors, config, sink)
        kinds = ", ".join(sorted({t.type for t in flat.values()}))
        where = "safetensors metadata describes" if source.metadata else f"{weights.files[0]} holds"
        return TORCHAO_UNMARKED, (f"{where} {len(flat)} tensors of {kinds}",), "torchao"
    if not weights.files:
        return UNKNOWN, (), None
    _check_leftovers(directory, tensors, sink)
    if is_file(directory / "fakequant_manifest.json"):
        return FAKEQUANT, ("fakequant_manifest.json",), None
    if isinstance(config.get(QAT_KEY), dict):
        return QAT, (f"config.json: {QAT_KEY} records a fake-quantization recipe",), None
    return DENSE, (f"{weights.files[0]} {source.content}",), None


def _from_block(
    config: dict[str, Any],
    weights: WeightFiles,
    tensors: dict[str, TensorInfo],
    flat: dict[str, FlatTensor],
    sink: Sink,
    packed: Mapping[str, Packed],
) -> Verdict:
    block = quantization_block(config)
    if (mlx := mlx_block(config, tensors)) is not None:
        raise mlx
    method = quant_method(block)
    if method.startswith(MODELOPT) and not packed:
        raise ArtifactError("config.json: the model is quantized by ModelOpt", MODELOPT_REMEDY)
    if method != "torchao":
        if flat:
            name = next(iter(flat))
            raise ArtifactError(
                f"config.json says {method}, and '{name}' is a torchao tensor",
                "Restore the quantization_config block",
            )
        if packed:
            # Layers may differ in their number format; those of one format have parts of the same dtypes.
            stored: dict[str, dict[str, TensorInfo]] = {}
            for weight in packed.values():
                stored.setdefault(weight.type, {}).update({p.name: p for p in weight.parts.values()})
            parts = {name for group in stored.values() for name in group}
            for group in ({n: info for n, info in tensors.items() if n not in parts}, *stored.values()):
                check_layers(group, sink)
            return method, (f"config.json: quantization_config.quant_method is {method}",), method
        return OTHER_QUANTIZER, (f"config.json: quantization_config.quant_method is {method}",), method
    check_layers(tensors, sink)
    recipe = check_block(block)
    if not flat and weights.files:
        raise ArtifactError(
            f"config.json says torchao, and {weights.files[0]} holds no quantized tensor",
            "The weights are not this config's: finalize again, or remove the quantization_config block",
        )
    check_agreement(recipe, flat, sink)
    check_quantized(flat, tensors, config, sink, by_module=chooses_by_module(recipe))
    return TORCHAO, ("config.json: quantization_config.quant_method is torchao",), method


def quantization_block(config: dict[str, Any]) -> Any:
    """``quantization_config`` of a config or, as transformers also reads it, of its language model's part."""
    inner = config.get("text_config")
    block = config.get("quantization_config")
    return inner.get("quantization_config") if block is None and isinstance(inner, dict) else block


def quant_method(block: Any) -> str:
    """The quantizer a ``quantization_config`` block names; raises `ArtifactError` when it names none."""
    method = method_of(block)
    if not method or not method.isprintable():
        raise ArtifactError(
            "config.json: quantization_config has no quant_method", "Restore it, or finalize again"
        )
    return method


def _check_leftovers(directory: Path, tensors: dict[str, TensorInfo], sink: Sink) -> None:
    """Reports one tensor that another quantizer wrote, in a directory whose config no longer says so."""
    for tensor in tensors.values():
        owner, remedy = None, "Restore the quantization_config block of config.json"
        if tensor.name.endswith(_LEFTOVER_SUFFIXES):
            owner = next(o for suffix, o in _LEFTOVERS.items() if tensor.name.endswith(suffix))
        if owner is None and tensor.name.endswith(".weight") and tensor.dtype not in FLOAT_DTYPES:
            owner = "an unknown quantizer"
            if f"{tensor.name.removesuffix('weight')}scales" in tensors:
                owner, remedy = "mlx", MLX_REMEDY
        if owner and owner != "mlx" and is_file(directory / "hf_quant_config.json"):
            owner, remedy = "ModelOpt (hf_quant_config.json)", MODELOPT_REMEDY
        if owner is not None:
            what = f"'{tensor.name}' ({tensor.dtype}) was written by {owner}"
            what += ", and config.json has no quantization_config"
            sink(ArtifactError(f"{tensor.file}: {what}", remedy))
            return


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter of PEFT's."""
    return is_file(directory / ADAPTER_CONFIG)


def holds_adapter(path: str | Path) -> bool:
    """Whether a directory is an adapter, or a training run with checkpoints of adapters."""
    return is_adapter(Path(path)) or next(Path(path).glob(f"*/{ADAPTER_CONFIG}"), None) is not None

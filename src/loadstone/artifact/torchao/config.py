"""The ``quantization_config`` block of a torchao artifact.

May it be used at all, and does it fit the tensors?
"""

from __future__ import annotations

from typing import Any

from loadstone.artifact.files import Sink
from loadstone.artifact.torchao.checks import FlatTensor, dtype_name, foreign_class
from loadstone.errors import ArtifactError

_CONFIGS = frozenset(
    [
        "AOPerModuleConfig",
        "AWQConfig",
        "BlockSparseWeightConfig",
        "Float8DynamicActivationFloat8WeightConfig",
        "Float8DynamicActivationInt4WeightConfig",
        "Float8StaticActivationFloat8WeightConfig",
        "Float8WeightOnlyConfig",
        "FqnToConfig",
        "GGUFWeightOnlyConfig",
        "Int4WeightOnlyConfig",
        "Int8DynamicActivationInt8WeightConfig",
        "Int8DynamicActivationInt4WeightConfig",
        "Int8DynamicActivationIntxWeightConfig",
        "Int8DynamicActivationUIntxWeightConfig",
        "Int8StaticActivationInt8WeightConfig",
        "Int8WeightOnlyConfig",
        "IntxWeightOnlyConfig",
        "MXDynamicActivationMXWeightConfig",
        "MXFPInferenceConfig",
        "ModuleFqnToConfig",
        "NVFP4DynamicActivationNVFP4WeightConfig",
        "NVFP4InferenceConfig",
        "NVFP4WeightOnlyConfig",
        "SemiSparseWeightConfig",
        "SmoothQuantConfig",
        "StretchedIntxWeightConfig",
        "UIntxWeightOnlyConfig",
    ]
)
_HELPERS = frozenset(
    [
        "Float8MMConfig",
        "Float8PackingFormat",
        "Int4ChooseQParamsAlgorithm",
        "Int4PackingFormat",
        "IntxChooseQParamsAlgorithm",
        "IntxPackingFormat",
        "KernelPreference",
        "MappingType",
        "PackingFormat",
        "PerAxis",
        "PerBlock",
        "PerGroup",
        "PerRow",
        "PerTensor",
        "PerToken",
        "QuantizeTensorToFloat8Kwargs",
        "QuantizeTensorToInt8Kwargs",
        "ScaleCalculationMode",
        "TorchAODType",
        "ZeroPointDomain",
    ]
)
_ALLOWED = _CONFIGS | _HELPERS
_PER_MODULE = ("FqnToConfig", "ModuleFqnToConfig", "AOPerModuleConfig")

# Tensor classes that each config makes, and whether they quantize activations as they run.
_MAKES: dict[str, tuple[tuple[str, ...], bool | None]] = {
    "Int8DynamicActivationIntxWeightConfig": (("IntxUnpackedToInt8Tensor",), True),
    "IntxWeightOnlyConfig": (("IntxUnpackedToInt8Tensor",), False),
    "Int8DynamicActivationInt8WeightConfig": (("Int8Tensor",), True),
    "Int8WeightOnlyConfig": (("Int8Tensor",), False),
    "Float8DynamicActivationFloat8WeightConfig": (("Float8Tensor",), True),
    "Float8WeightOnlyConfig": (("Float8Tensor",), False),
    "Float8DynamicActivationInt4WeightConfig": (("Int4Tensor",), None),
    "Int4WeightOnlyConfig": (("Int4Tensor", "Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor"), None),
    "NVFP4DynamicActivationNVFP4WeightConfig": (("NVFP4Tensor",), True),
    "NVFP4WeightOnlyConfig": (("NVFP4Tensor",), False),
    "MXDynamicActivationMXWeightConfig": (("MXTensor",), True),
}


def check_block(block: dict[str, Any]) -> dict[str, Any]:
    """The torchao config in a ``quantization_config`` block.

    Raises `ArtifactError` unless it names torchao's only.
    """
    quant_type = block.get("quant_type")
    if isinstance(quant_type, str):
        raise ArtifactError(
            f"config.json: quant_type is {ascii(quant_type)[:80]}, the form of an old transformers",
            "Finalize again from the source",
        )
    config = quant_type.get("default") if isinstance(quant_type, dict) and len(quant_type) == 1 else None
    if not isinstance(config, dict) or "_type" not in config or "_data" not in config:
        raise ArtifactError(
            "config.json: quantization_config.quant_type is malformed", "Restore it, or finalize again"
        )
    foreign = foreign_class(config, _ALLOWED)
    if foreign is None and config["_type"] not in _CONFIGS:
        foreign = str(config["_type"])
    if foreign is not None:
        raise ArtifactError(
            f"config.json: quantization_config names {ascii(foreign)[:80]}, no torchao configuration",
            "Do not trust this artifact, or restore the block",
        )
    return config


def check_agreement(config: dict[str, Any], quantized: dict[str, FlatTensor], sink: Sink) -> None:
    """Reports quantized tensors that the config could not have made: two recipes mixed, an edited block."""
    everything = _inner_configs(config)
    if not everything or any(c["_type"] not in _MAKES for c in everything):
        return
    for tensor in quantized.values():
        named = _named_config(config, tensor.name)
        choices = [named] if named is not None else everything
        differences = [_difference(choice, tensor) for choice in choices]
        if all(differences):
            sink(
                ArtifactError(
                    f"{tensor.parts['qdata'].file}: quantized tensor '{tensor.name}' {differences[0]}, "
                    f"against {choices[0]['_type']} in config.json",
                    "The files are of two recipes: finalize again from the source",
                )
            )


def chooses_by_module(config: dict[str, Any]) -> bool:
    """Whether the config gives modules schemes of their own."""
    return config["_type"] in _PER_MODULE


def _named_config(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The config that a table of modules gives this tensor by its exact name, None when it names it in no such way."""
    data = config["_data"] if chooses_by_module(config) and isinstance(config["_data"], dict) else {}
    table = data.get("fqn_to_config") or data.get("module_fqn_to_config")
    if not isinstance(table, dict):
        return None
    found = table.get(name, table.get(name.rpartition(".")[0]))
    return found if isinstance(found, dict) and found.get("_type") in _CONFIGS else None


def _inner_configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    if config["_type"] not in _PER_MODULE:
        return [config]
    data = config["_data"] if isinstance(config["_data"], dict) else {}
    inner = [v for table in data.values() if isinstance(table, dict) for v in table.values()]
    return [c for c in inner if isinstance(c, dict) and c.get("_type") in _CONFIGS]


def _difference(config: dict[str, Any], tensor: FlatTensor) -> str | None:
    classes, activations = _MAKES[config["_type"]]
    data = config["_data"] if isinstance(config["_data"], dict) else {}
    if tensor.type not in classes:
        return f"is a {tensor.type}"
    if activations is not None and tensor.quantizes_activations != activations:
        return "quantizes activations" if tensor.quantizes_activations else "does not quantize activations"
    wanted, found = dtype_name(data.get("weight_dtype")), dtype_name(tensor.attributes.get("target_dtype"))
    if wanted and found and wanted != found:
        return f"holds {found}, not {wanted}"
    return None

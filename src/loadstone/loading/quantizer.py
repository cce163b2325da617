"""The quantizer a loaded model carries, so that `save_pretrained` and others see what stock loading would give."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, FlatTensor
from loadstone.errors import LoadstoneError
from loadstone.quantization.schemes import Scheme
from loadstone.quantization.torchao_config import scheme_of, to_torchao

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach_quantizer(artifact: Artifact, model: PreTrainedModel) -> None:
    """Set ``config.quantization_config`` and ``hf_quantizer`` as transformers' own load does."""
    from transformers import PreTrainedModel, TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    block = artifact.quantization_config
    config: Any
    if block is not None:
        with warnings.catch_warnings():
            # A table of modules holds torchao's `_default`, which it deprecates and transformers still reads.
            warnings.filterwarnings("ignore", message="Config Deprecation: _default")
            config = TorchAoConfig.from_dict({k: v for k, v in block.items() if k != "quant_method"})
    else:
        config = TorchAoConfig(to_torchao(recovered_scheme(artifact)))
    model.config.quantization_config = config
    quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    if artifact.source.metadata:
        quantizer.metadata = artifact.source.metadata
    # Sets whether modules are offloaded to the CPU.
    quantizer.validate_environment(device_map=getattr(model, "hf_device_map", None))
    model.hf_quantizer = quantizer
    # What transformers' own load sets before and after it reads the weights; some models ask (Jamba's Mamba layers).
    model.is_quantized = True
    model.quantization_method = config.quant_method
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._is_quantized = True


def recovered_scheme(artifact: Artifact) -> Scheme:
    """The scheme of most quantized tensors of an artifact, recovered from the tensors alone."""
    by_scheme: dict[Any, list[str]] = {}
    for name, tensor in artifact.quantized.items():
        by_scheme.setdefault(_scheme_or_kind(tensor), []).append(name)
    described = artifact.source.describe(max(by_scheme.values(), key=len)[0])
    return scheme_of(described, has_zero_points=has_zero_points(artifact, described))


def _scheme_or_kind(tensor: FlatTensor) -> Any:
    """A tensor's scheme or, where the header of a ``.bin`` does not describe it, what the header says of it."""
    try:
        return scheme_of(tensor)
    except (LoadstoneError, LookupError, TypeError, ValueError):
        return tensor.type, tensor.nominal_bits, tensor.quantizes_activations


def has_zero_points(artifact: Artifact, tensor: FlatTensor) -> bool:
    """Whether a stored tensor's zero points are anything but 0; reads those bytes only."""
    part = tensor.parts.get("zero_point")
    return part is not None and bool(artifact.source.read(part).any())

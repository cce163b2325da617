"""The quantizer a loaded model carries, so that `save_pretrained` and others see what stock loading would give."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, FlatTensor
from loadstone.quantization.schemes import Scheme
from loadstone.quantization.torchao_config import scheme_of, to_torchao

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach_quantizer(artifact: Artifact, model: PreTrainedModel) -> None:
    """Set ``config.quantization_config`` and ``hf_quantizer`` as transformers' own load does."""
    from transformers import TorchAoConfig
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
    if artifact.table is not None:
        quantizer.metadata = artifact.table.metadata
    model.hf_quantizer = quantizer


def recovered_scheme(artifact: Artifact) -> Scheme:
    """The scheme of most quantized tensors of an artifact, told from the tensors alone."""
    if artifact.quantized:
        by_scheme: dict[Scheme, list[FlatTensor]] = {}
        for tensor in artifact.quantized.values():
            by_scheme.setdefault(scheme_of(tensor), []).append(tensor)
        first = max(by_scheme.values(), key=len)[0]
        return scheme_of(first, has_zero_points=has_zero_points(artifact, first))
    from loadstone.loading.binfiles import read_bin_file
    from loadstone.quantization.flatten import flatten

    # A pickle's header tells classes; the scheme itself is told from one tensor of the usual class, read whole.
    kinds: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for contents in artifact.bins:
        for name, found in contents.quantized.items():
            kind = (found.type, found.nominal_bits, found.quantizes_activations)
            kinds.setdefault(kind, []).append((contents.file, name))
    file, name = max(kinds.values(), key=len)[0]
    flat, parts = flatten(name, read_bin_file(artifact.path / file)[name])
    return scheme_of(flat, has_zero_points="zero_point" in parts and bool(parts["zero_point"].any()))


def has_zero_points(artifact: Artifact, tensor: FlatTensor) -> bool:
    """Whether a stored tensor's zero points are anything but 0; reads those bytes only."""
    part = tensor.parts.get("zero_point")
    if part is None:
        return False
    with (artifact.path / part.file).open("rb") as file:
        file.seek(part.begin)
        return any(file.read(part.nbytes))

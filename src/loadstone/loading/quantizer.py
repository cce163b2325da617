"""The quantizer a loaded model carries, so that `save_pretrained` and others see what stock loading would give."""

from __future__ import annotations

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
    from loadstone.loading.binfiles import read_bins
    from loadstone.loading.lazy import LazyQuantized

    lazy = next(v for v in read_bins(artifact, None).values() if isinstance(v, LazyQuantized))
    zero_point = lazy.parts.get("zero_point")
    return scheme_of(lazy.flat, has_zero_points=zero_point is not None and bool(zero_point.any()))


def has_zero_points(artifact: Artifact, tensor: FlatTensor) -> bool:
    """Whether a stored tensor's zero points are anything but 0; reads those bytes only."""
    part = tensor.parts.get("zero_point")
    if part is None:
        return False
    with (artifact.path / part.file).open("rb") as file:
        file.seek(part.begin)
        return any(file.read(part.nbytes))

"""Containers that quantized weights are stored in, one file each."""

from loadstone.errors import UsageError
from loadstone.finalization.encoders.base import Encoder, Encoding

TORCHAO, COMPRESSED_TENSORS = "torchao", "compressed-tensors"
LAYOUTS = (TORCHAO, COMPRESSED_TENSORS)

__all__ = ["COMPRESSED_TENSORS", "LAYOUTS", "TORCHAO", "Encoder", "Encoding", "encoder_for"]


def encoder_for(layout: str, device: str = "cpu") -> Encoder:
    """The output format of a name; raises `UsageError` for an unknown one. ``device``: where weights are quantized."""
    from loadstone.finalization.encoders.compressed_tensors import PackedEncoder
    from loadstone.finalization.encoders.torchao import TorchaoEncoder

    if layout == TORCHAO:
        return TorchaoEncoder(device)
    if layout == COMPRESSED_TENSORS:
        return PackedEncoder()
    raise UsageError(f"the layout '{layout}' is not known", f"One of {', '.join(LAYOUTS)}")

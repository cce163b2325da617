"""Containers that quantized weights are stored in, one file each."""

from loadstone.finalization.encoders.base import Encoder, Encoding

__all__ = ["Encoder", "Encoding"]

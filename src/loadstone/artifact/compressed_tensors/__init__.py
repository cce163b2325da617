"""The compressed-tensors layout, which serving engines run on their own kernels: its config block and tensors."""

from loadstone.artifact.compressed_tensors.block import Block, Group, read_block, write_block
from loadstone.artifact.compressed_tensors.scheme import LayerScheme, QuantArgs
from loadstone.artifact.compressed_tensors.tensors import PackedWeight, packed_weights

__all__ = [
    "Block",
    "Group",
    "LayerScheme",
    "PackedWeight",
    "QuantArgs",
    "packed_weights",
    "read_block",
    "write_block",
]

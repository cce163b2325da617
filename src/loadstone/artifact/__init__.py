"""What a directory is: header readers, detection, provenance. No torch anywhere in this package."""

from loadstone.artifact.detect import Artifact, detect
from loadstone.artifact.formats.safetensors import ShardHeader, TensorInfo, read_header
from loadstone.artifact.formats.weights import TensorTable, WeightFiles
from loadstone.artifact.torchao.tensors import FlatTensor

__all__ = [
    "Artifact",
    "FlatTensor",
    "ShardHeader",
    "TensorInfo",
    "TensorTable",
    "WeightFiles",
    "detect",
    "read_header",
]

"""What a directory is: header readers, detection, provenance. No torch anywhere in this package."""

from loadstone.artifact.detect import Artifact, detect
from loadstone.artifact.headers import ShardHeader, TensorInfo, read_header
from loadstone.artifact.torchao_tensors import FlatTensor
from loadstone.artifact.weights import TensorTable, WeightFiles

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

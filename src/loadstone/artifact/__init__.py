"""What a directory is: header readers, detection, provenance. No torch anywhere in this package."""

from loadstone.artifact.detect import Artifact, detect
from loadstone.artifact.formats.safetensors import ShardHeader, TensorInfo, read_header
from loadstone.artifact.formats.weights import WeightFiles
from loadstone.artifact.source import Source
from loadstone.artifact.torchao.checks import FlatTensor

__all__ = [
    "Artifact",
    "FlatTensor",
    "ShardHeader",
    "Source",
    "TensorInfo",
    "WeightFiles",
    "detect",
    "read_header",
]

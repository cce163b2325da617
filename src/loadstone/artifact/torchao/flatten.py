"""A live torchao tensor as the facts and parts that safetensors holds, by torchao's own flattening."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.artifact.torchao.checks import SUBCLASSES, FlatTensor, unknown_class_hint
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

# torch dtype names in safetensors' spelling.
SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "complex64": "C64",
}  # fmt: skip
TORCH_DTYPES = {spelling: name for name, spelling in SAFETENSORS_DTYPES.items()}


def flatten(name: str, tensor: torch.Tensor) -> tuple[FlatTensor, dict[str, torch.Tensor]]:
    """Facts (class, attributes, part shapes) and parts by torchao's data names; `ArtifactError` for unknown classes."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    kind = type(tensor).__name__
    if kind not in SUBCLASSES:
        raise ArtifactError(
            f"tensor '{name}' has the unknown quantized class '{kind}'", unknown_class_hint(kind)
        )
    # torchao wants a module path before the parameter's name.
    data, metadata = flatten_tensor_state_dict({"m.weight": tensor.detach()})
    text = metadata["m.weight"]
    description = json.loads(text)
    parts = {n: data[f"m._weight_{n}"] for n in description["_tensor_data_names"]}
    infos = {n: TensorInfo(n, dtype_name(p.dtype), tuple(p.shape), "", 0, p.nbytes) for n, p in parts.items()}
    return FlatTensor(name, kind, description["_data"], infos, text), parts


def describe(tensor: torch.Tensor) -> str:
    """The text that `flatten` puts into the header for a torchao tensor, without looking at its values."""
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    return json.dumps(tensor, cls=TensorSubclassAttributeJSONEncoder)


def plain_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that a tensor of any class consists of, by name: itself, where it is plain."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from plain_parts(f"{name}.{part}", getattr(tensor, part))


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16 -> 'BF16'``."""
    return SAFETENSORS_DTYPES[str(dtype).removeprefix("torch.")]


def torch_dtype(name: str) -> torch.dtype:
    """``'BF16' -> torch.bfloat16``."""
    import torch

    return getattr(torch, TORCH_DTYPES[name])


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order, read in place where it lies so on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    if flat.stride(0) != 1:
        # One element with any stride counts as contiguous, and cannot be viewed as bytes.
        flat = flat.new_empty(flat.shape).copy_(flat)
    return flat.view(torch.uint8).numpy().data

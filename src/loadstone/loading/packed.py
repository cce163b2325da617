"""Weights of a compressed-tensors artifact, decoded while they are read: block of rows by block of rows.

What comes out is a plain tensor of the model's dtype, so experts merge and layers are placed as in a dense checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from loadstone.artifact import Artifact, FlatTensor, TensorInfo
from loadstone.artifact.compressed_tensors import PackedWeight
from loadstone.artifact.compressed_tensors.layout import row_tile, rows_needed
from loadstone.artifact.compressed_tensors.tensors import is_side_tensor
from loadstone.artifact.detect import DENSE
from loadstone.artifact.source import Source
from loadstone.artifact.torchao.flatten import SAFETENSORS_DTYPES, torch_dtype
from loadstone.artifact.values import Limits, packed_limits
from loadstone.errors import ArtifactError
from loadstone.quantization.packing import decode_rows

if TYPE_CHECKING:
    import torch

# Weights that are decoded at once: bounds what is in memory beside the result.
_BLOCK = 1 << 22

Read = Callable[[str, int, int], "torch.Tensor"]


class LazyPacked:
    """A packed weight before it is read. ``parts`` maps suffixes to safetensors slices."""

    def __init__(self, weight: PackedWeight, parts: dict[str, Any]) -> None:
        self.weight = weight
        self.parts = parts

    def __getitem__(self, index: Any) -> Any:
        # A part is asked for where a weight is divided among GPUs.
        return self if index is Ellipsis else self.to()[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight (out, in) in ``dtype`` (None: of its scales), decoded on ``device``."""

        def read(suffix: str, start: int, stop: int) -> torch.Tensor:
            part = self.parts[suffix]
            found = part[start:stop] if self.weight.parts[suffix].shape else part[...]
            return found if device is None else found.to(device)

        rows = self.weight.shape[0]
        return decode(self.weight, read, 0, rows, dtype or torch_dtype(self.weight.dtype))

    def get_dtype(self) -> str:
        """What a safetensors slice answers: the model sees the weight in its own floating dtype."""
        return self.weight.dtype

    def get_shape(self) -> list[int]:
        return list(self.weight.shape)


def decode(weight: PackedWeight, read: Read, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``start`` to ``stop`` (multiples of `row_tile`, or the last) of a weight, in ``dtype``.

    ``read(suffix, first, last)`` gives rows of a stored tensor. Raises `ArtifactError` naming a weight whose
    ``weight_shape`` contradicts it.
    """
    import torch

    scheme, (_, columns) = weight.scheme, weight.shape
    tile = row_tile(scheme)
    step = max(_BLOCK // (columns * tile), 1) * tile
    result = None
    fixed: dict[str, torch.Tensor] = {}
    for first in range(start, stop, step):
        last = min(first + step, stop)
        parts = {}
        for suffix, info in weight.parts.items():
            low, high = rows_needed(scheme, suffix, info.shape, first, last, weight.padded)
            if (low, high) == (0, info.shape[0] if info.shape else 1):
                # The same for every block: a scale of the whole tensor, an order of columns.
                if suffix not in fixed:
                    fixed[suffix] = read(suffix, low, high)
                parts[suffix] = fixed[suffix]
            else:
                parts[suffix] = read(suffix, low, high)
        if first == start and "weight_shape" in parts:
            _check_shape(weight, parts["weight_shape"])
        rows = decode_rows(scheme, parts, columns, dtype, weight.padded)
        if result is None:
            if last == stop:
                return rows
            result = torch.empty(stop - start, columns, dtype=dtype, device=rows.device)
        result[first - start : last - start] = rows
    return result if result is not None else torch.empty(0, columns, dtype=dtype)


def _check_shape(weight: PackedWeight, stored: torch.Tensor) -> None:
    if tuple(stored.tolist()) != weight.shape:
        info = weight.parts["weight_shape"]
        raise ArtifactError(
            f"{info.file}: '{info.name}' says {stored.tolist()}, the tensors beside it hold {list(weight.shape)}",
            "Copy the file again, or make the artifact again",
        )


def dense_view(artifact: Artifact) -> Artifact:
    """The artifact as if its weights were plain: what a command that wants an unquantized model takes as its source."""
    dtype = _model_dtype(artifact)
    tensors: dict[str, TensorInfo] = {}
    parts = {part.name for weight in artifact.packed.values() for part in weight.parts.values()}
    for name, info in artifact.tensors.items():
        if name not in parts and not is_side_tensor(name):
            tensors[name] = info
    for name, weight in artifact.packed.items():
        nbytes = weight.numel * torch_dtype(dtype).itemsize
        tensors[name] = TensorInfo(name, dtype, weight.shape, weight.values.file, 0, nbytes)
    config = {key: value for key, value in artifact.config.items() if key != "quantization_config"}
    if isinstance(inner := config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in inner.items() if key != "quantization_config"}
    source: Any = DecodedSource(artifact.source, artifact.packed, tensors)
    return replace(artifact, kind=DENSE, config=config, source=source, packed={}, quant_method=None)


def _model_dtype(artifact: Artifact) -> str:
    """The floating dtype that the model computes in, in safetensors' spelling."""
    inner = artifact.config.get("text_config")
    for config in (artifact.config, inner if isinstance(inner, dict) else {}):
        declared = config.get("dtype") or config.get("torch_dtype")
        if isinstance(declared, str) and declared.removeprefix("torch.") in SAFETENSORS_DTYPES:
            return SAFETENSORS_DTYPES[declared.removeprefix("torch.")]
    return next(iter(artifact.packed.values())).dtype


@dataclass(frozen=True)
class DecodedSource:
    """The tensors of a packed artifact, packed weights as plain ones (see `artifact.source` for the attributes)."""

    stored: Source = field(repr=False)
    packed: dict[str, PackedWeight] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    quantized: dict[str, FlatTensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    foreign: tuple[ArtifactError, ...] = ()
    content: ClassVar[str] = "holds packed weights"
    divisible: ClassVar[bool] = True
    streamable: ClassVar[bool] = True
    mappable: ClassVar[bool] = False
    repeats_ties: ClassVar[bool] = False

    @property
    def files(self) -> tuple[str, ...]:
        return self.stored.files

    def read(
        self, info: TensorInfo, start: int = 0, stop: int | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        weight = self.packed.get(info.name)
        if weight is None:
            return self.stored.read(info, start, stop, pinned=pinned)

        def read(suffix: str, first: int, last: int) -> torch.Tensor:
            part = weight.parts[suffix]
            if not part.shape:
                return self.stored.read(part)
            size = part.numel // part.shape[0]
            return self.stored.read(part, first * size, last * size).view(-1, *part.shape[1:])

        dtype, (rows, columns) = torch_dtype(info.dtype), weight.shape
        if stop is None:
            return decode(weight, read, 0, rows, dtype)
        tile = row_tile(weight.scheme)
        first = start // columns // tile * tile
        last = min(-(-stop // columns // tile) * tile, rows) if stop > start else first
        values = decode(weight, read, first, last, dtype).reshape(-1)
        return values[start - first * columns : stop - first * columns]

    @contextmanager
    def opened(self) -> Iterator[tuple[dict[str, Any], dict[str, FlatTensor]]]:
        with self.stored.opened() as (stored, _):
            found = {name: part for name, part in stored.items() if name in self.tensors}
            for name, weight in self.packed.items():
                found[name] = LazyPacked(weight, {s: stored[p.name] for s, p in weight.parts.items()})
            yield found, {}

    def describe(self, name: str) -> FlatTensor:
        return self.quantized[name]

    def check_values(self, limits: Limits) -> None:
        self.stored.check_values(limits | packed_limits(self.packed.values()))

"""A quantized artifact as if its weights were plain: the source that finalize and export stream from."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loadstone.artifact import Artifact, FlatTensor, TensorInfo
from loadstone.artifact.compressed_tensors.tensors import is_side_tensor
from loadstone.artifact.detect import DENSE
from loadstone.artifact.files import following_links
from loadstone.artifact.manifest import read_manifest
from loadstone.artifact.packed import Packed
from loadstone.artifact.source import Source
from loadstone.artifact.torchao.flatten import SAFETENSORS_DTYPES, torch_dtype
from loadstone.artifact.values import Limits, check_tensor, limits_of, packed_limits
from loadstone.errors import ArtifactError, LoadstoneError
from loadstone.loading.packed import LazyPacked, decode, empty_biases
from loadstone.loading.rebuild import LazyQuantized, rebuild
from loadstone.quantization.quantize import dense
from loadstone.quantization.schemes import recipe_for
from loadstone.quantization.torchao_config import scheme_of

if TYPE_CHECKING:
    import torch

# Offsets of decoded weights, which are in no file, begin here: a part of one (an expert's) is found by its offset.
_BEYOND = 1 << 60


def dense_view(artifact: Artifact, dtype: str = "auto") -> Artifact:
    """The artifact with its quantized weights as plain ones: what takes an unquantized model takes it as its source.

    ``dtype``: floating dtype to decode to; auto is that of the config.
    """
    stored = _model_dtype(artifact) if dtype == "auto" else SAFETENSORS_DTYPES[dtype]
    weights: dict[str, Packed | FlatTensor] = {**artifact.packed, **artifact.quantized}
    parts = {part.name for weight in weights.values() for part in weight.parts.values()}
    parts |= empty_biases(artifact)
    tensors: dict[str, TensorInfo] = {}
    for name, info in artifact.tensors.items():
        if name not in parts and not (artifact.packed and is_side_tensor(name)):
            tensors[name] = info
    position = _BEYOND
    for name, weight in weights.items():
        file = next(iter(weight.parts.values())).file
        size = prod(weight.shape) * torch_dtype(stored).itemsize
        tensors[name] = TensorInfo(name, stored, tuple(weight.shape), file, position, position + size)
        position += size
    # Experts that torchao multiplies one by one are plain here.
    dropped = (
        ("quantization_config", "experts_implementation") if artifact.is_torchao else ("quantization_config",)
    )
    config = {key: value for key, value in artifact.config.items() if key not in dropped}
    if isinstance(inner := config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in inner.items() if key != "quantization_config"}
    source: Any = DecodedSource(artifact.source, weights, tensors)
    return replace(
        artifact,
        kind=DENSE,
        config=config,
        source=source,
        packed={},
        quant_method=None,
        decoded=(*_recorded(artifact), _described(source)),
    )


def _described(source: DecodedSource) -> str:
    """The number formats of quantized weights, the most frequent first."""
    kinds = Counter(source.kind_of(weight) for weight in source.weights.values())
    return " and ".join(kind for kind, _ in kinds.most_common())


def _recorded(artifact: Artifact) -> tuple[str, ...]:
    """What the artifact's own source was decoded from, as its manifest says."""
    try:
        with following_links(artifact.follow_links):
            source = (read_manifest(artifact.path) or {}).get("source")
    except ArtifactError:
        return ()
    found = source.get("decoded") if isinstance(source, dict) else None
    return tuple(str(each) for each in found) if isinstance(found, list) else ()


def _model_dtype(artifact: Artifact) -> str:
    """The floating dtype that the model computes in, in safetensors' spelling."""
    inner = artifact.config.get("text_config")
    for config in (artifact.config, inner if isinstance(inner, dict) else {}):
        declared = config.get("dtype") or config.get("torch_dtype")
        if isinstance(declared, str) and declared.removeprefix("torch.") in SAFETENSORS_DTYPES:
            return SAFETENSORS_DTYPES[declared.removeprefix("torch.")]
    return next((weight.dtype for weight in artifact.packed.values()), "BF16")


@dataclass(frozen=True)
class DecodedSource:
    """The tensors of a quantized artifact, its weights as plain ones (see `artifact.source` for the attributes)."""

    stored: Source = field(repr=False)
    weights: Mapping[str, Packed | FlatTensor] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    quantized: dict[str, FlatTensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    foreign: tuple[ArtifactError, ...] = ()
    content: ClassVar[str] = "holds quantized weights"
    streamable: ClassVar[bool] = True
    mappable: ClassVar[bool] = False
    repeats_ties: ClassVar[bool] = False

    @property
    def files(self) -> tuple[str, ...]:
        return self.stored.files

    def weight_of(self, info: TensorInfo) -> tuple[Packed | FlatTensor | None, int]:
        """The quantized weight that ``info`` is, or is a part of, and the element it begins at; None for others."""
        if info.begin < _BEYOND:
            return None, 0
        if (weight := self.weights.get(info.name)) is not None:
            return weight, 0
        whole = self._in_order[bisect_right(self._in_order, info.begin, key=lambda each: each.begin) - 1]
        return self.weights[whole.name], (info.begin - whole.begin) // torch_dtype(whole.dtype).itemsize

    def weights_of(self, info: TensorInfo) -> tuple[Packed | FlatTensor, ...]:
        """The quantized weight that ``info`` is decoded from; none for a plain tensor."""
        weight, _ = self.weight_of(info)
        return () if weight is None else (weight,)

    @cached_property
    def _in_order(self) -> list[TensorInfo]:
        return sorted((self.tensors[name] for name in self.weights), key=lambda each: each.begin)

    def kind_of(self, weight: Packed | FlatTensor) -> str:
        """The number format of a weight: FP8 block 128, or of torchao's tensors the recipe."""
        if not isinstance(weight, FlatTensor):
            return weight.type
        try:
            return str(recipe_for(scheme_of(self.stored.describe(weight.name))))
        except (LoadstoneError, LookupError, TypeError, ValueError):
            return weight.type

    def tile(self, info: TensorInfo) -> int:
        weight, first = self.weight_of(info)
        if weight is None:
            return self.stored.tile(info)
        tile = prod(weight.shape) if isinstance(weight, FlatTensor) else weight.row_tile * weight.shape[-1]
        return info.numel if first % tile or tile > info.numel else tile

    def read(
        self, info: TensorInfo, start: int = 0, stop: int | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        weight, offset = self.weight_of(info)
        if weight is None:
            return self.stored.read(info, start, stop, pinned=pinned)
        shape = info.shape if stop is None else (-1,)
        start, stop = start + offset, (info.numel if stop is None else stop) + offset
        dtype = torch_dtype(info.dtype)
        if isinstance(weight, FlatTensor):
            parts = {name: self._part(weight, name, None) for name in weight.parts}
            whole = dense(rebuild(self.stored.describe(weight.name), parts)).to(dtype)
            return whole.reshape(-1)[start:stop].reshape(shape)
        columns, tile = weight.shape[-1], weight.row_tile
        first = start // columns // tile * tile
        last = min(-(-stop // columns // tile) * tile, weight.numel // columns) if stop > start else first
        values = decode(weight, lambda *at: self._part(weight, at[0], at[1:]), first, last, dtype).reshape(-1)
        return values[start - first * columns : stop - first * columns].reshape(shape)

    def _part(self, weight: Packed | FlatTensor, suffix: str, rows: Any) -> torch.Tensor:
        """A stored tensor, or ``rows`` (first, last) of its first dimension; raises `ArtifactError` for bad scales."""
        part = weight.parts[suffix]
        if rows is None or not part.shape:
            found = self.stored.read(part)
        else:
            size = part.numel // part.shape[0]
            found = self.stored.read(part, rows[0] * size, rows[1] * size).view(-1, *part.shape[1:])
        if "scale" in suffix:
            # A scale of zero gives zeros, which nothing that looks at the weights would notice.
            limits = limits_of([weight]) if isinstance(weight, FlatTensor) else packed_limits([weight])
            check_tensor(found, part, limits)
        return found

    @contextmanager
    def opened(self) -> Iterator[tuple[dict[str, Any], dict[str, FlatTensor]]]:
        with self.stored.opened() as (stored, flats):
            found = {name: part for name, part in stored.items() if name in self.tensors}
            for name, weight in self.weights.items():
                if isinstance(weight, FlatTensor):
                    slices = {key: stored[part.name] for key, part in weight.parts.items()}
                    found[name] = _LazyDense(flats[name], slices)
                else:
                    found[name] = LazyPacked(weight, {s: stored[p.name] for s, p in weight.parts.items()})
            yield found, {}

    def describe(self, name: str) -> FlatTensor:
        return self.quantized[name]

    def check_values(self, limits: Limits) -> None:
        flats = [weight for weight in self.weights.values() if isinstance(weight, FlatTensor)]
        packed = [weight for weight in self.weights.values() if not isinstance(weight, FlatTensor)]
        self.stored.check_values(limits | limits_of(flats) | packed_limits(packed))


class _LazyDense(LazyQuantized):
    """A torchao tensor before it is read, which comes out as plain numbers."""

    def __init__(self, flat: FlatTensor, parts: dict[str, Any]) -> None:
        super().__init__(flat, parts, None)

    def to(self, device: Any = None, dtype: Any = None) -> torch.Tensor:
        return dense(super().to(device)).to(dtype or torch_dtype("BF16"))

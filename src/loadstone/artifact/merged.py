"""A base model's tensors with an adapter merged in, one at a time as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from loadstone.artifact.adapter import Adapter, Change, LowRank
from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.artifact.source import Opened, Source
from loadstone.artifact.torchao.checks import FlatTensor
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from loadstone.artifact.values import Limits


@dataclass(frozen=True)
class MergedSource:
    """The tensors of a base with an adapter merged in (see `artifact.source` for the attributes).

    ``tensors``: those of the merged model. ``changes``: by their names. ``starts``: the base's tensor that a tensor of
    another name starts from. ``placed``: whether each change has found its tensor, without which nothing is read.
    """

    base: Source = field(repr=False)
    adapter: Adapter = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    changes: dict[str, Change] = field(repr=False, default_factory=dict)
    starts: dict[str, str] = field(repr=False, default_factory=dict)
    placed: bool = False
    quantized: dict[str, FlatTensor] = field(default_factory=dict)
    foreign: tuple[ArtifactError, ...] = ()
    content: ClassVar[str] = "holds plain tensors"
    mappable: ClassVar[bool] = False

    @property
    def metadata(self) -> dict[str, str]:
        return self.base.metadata

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        return self.base.shared

    @property
    def streamable(self) -> bool:
        return self.base.streamable

    @property
    def repeats_ties(self) -> bool:
        return self.base.repeats_ties

    @property
    def files(self) -> tuple[str, ...]:
        # Absolute, since they lie in another directory than the base's.
        return (*self.base.files, *(str((self.adapter.directory / n).absolute()) for n in self.adapter.files))

    def tile(self, info: TensorInfo) -> int:
        changed = info.name in self.changes or info.name in self.starts
        return info.numel if changed else self.base.tile(info)

    def read(
        self, info: TensorInfo, start: int = 0, stop: int | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        assert self.placed, "loading.adapters.placed comes before reading"
        if info.name not in self.changes and info.name not in self.starts:
            return self.base.read(info, start, stop, pinned=pinned)
        whole = self._merged(info)
        return whole if stop is None else whole.reshape(-1)[start:stop]

    def _part(self, info: TensorInfo) -> torch.Tensor:
        from loadstone.artifact.values import check_tensor

        part = self.adapter.source.read(info)
        check_tensor(part, info)
        return part

    def _merged(self, info: TensorInfo) -> torch.Tensor:
        """As peft computes it: products in float32, added to the weight."""
        from loadstone.artifact.torchao.flatten import torch_dtype
        from loadstone.artifact.values import check_tensor

        change = self.changes.get(info.name, Change())
        if change.trained is not None:
            weight = self._part(change.trained).to(torch_dtype(info.dtype))
        else:
            weight = self.base.read(self.base.tensors[self.starts.get(info.name, info.name)])
        if change.low_rank is not None:
            weight = self._with_product(weight, change.low_rank, change.transposed)
        if change.added is not None:
            vector, scale = change.added
            weight = weight.clone().add_(self._part(vector).float() * scale)
        if change.rows is not None:
            import torch

            rows, indices = change.rows
            weight = weight.index_copy(0, torch.tensor(indices), self._part(rows).to(weight.dtype))
        check_tensor(weight, info)
        return weight

    def _with_product(self, weight: torch.Tensor, low_rank: LowRank, transposed: bool) -> torch.Tensor:
        import torch

        product = self._part(low_rank.b).float() @ self._part(low_rank.a).float()
        change = (product.t() if transposed else product) * low_rank.scale
        if low_rank.magnitude is None:
            # peft rounds an embedding's change before it adds it, and a layer's sum once.
            return weight + change.to(weight.dtype) if low_rank.embedding else weight.clone().add_(change)
        merged = weight + change
        norm = torch.linalg.norm(merged.t() if transposed else merged, dim=1)
        factor = (self._part(low_rank.magnitude).float() / norm).view(-1, 1)
        return ((factor.t() if transposed else factor) * merged).to(weight.dtype)

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        assert self.placed, "loading.adapters.placed comes before reading"
        with self.base.opened() as (stored, quantized):
            changed = {name: _Merged(self, self.tensors[name]) for name in (*self.changes, *self.starts)}
            yield {name: value for name, value in stored.items() if name in self.tensors} | changed, quantized

    def describe(self, name: str) -> FlatTensor:
        return self.base.describe(name)

    def check_values(self, limits: Limits) -> None:
        self.base.check_values(limits)
        self.adapter.source.check_values({})


@dataclass(frozen=True)
class _Merged:
    """A merged tensor before it is read; it answers what a safetensors slice does."""

    source: MergedSource
    info: TensorInfo

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.source.read(self.info)[index]

    def get_dtype(self) -> str:
        return self.info.dtype

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

"""Experts that are stored one by one, as the tensor of all experts that transformers' own checkpoints hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from loadstone.artifact import Artifact, FlatTensor, TensorInfo
from loadstone.artifact.packed import Packed
from loadstone.artifact.torchao.flatten import torch_dtype
from loadstone.errors import ArtifactError
from loadstone.loading.complete import check_stored
from loadstone.loading.experts import experts_alone, learned_place, stored_layout
from loadstone.loading.meta import destinations, meta_model
from loadstone.quantization.model_facts import ExpertLayout, expert_layout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Merged(NamedTuple):
    """A tensor of all experts, and the matrices (out, in) that it is put together from: of each expert gate and up, or
    down."""

    info: TensorInfo
    members: tuple[TensorInfo, ...]
    layout: ExpertLayout

    def put_together(self, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        """The part of each expert, of the ``matrices`` of one or more."""
        import torch

        each = len(self.members) // self.info.shape[0]
        found = []
        for at in range(0, len(matrices), each):
            part = matrices[at : at + each]
            upright = torch.stack(part, 1).flatten(0, 1) if self.layout.interleaved else torch.cat(part)
            found.append(upright.t() if self.layout.transposed else upright)
        return found


def merged_experts(artifact: Artifact, trust_remote_code: bool = False) -> Artifact:
    """The artifact as if its experts were stored in one tensor, where transformers loads those of the model from one
    only; any other artifact as it is.

    Raises `ArtifactError` for experts that are not all there, of several dtypes, or that transformers would turn into
    something else.
    """
    tensors = artifact.tensors
    if not experts_alone(tensors):
        return artifact
    model = meta_model(artifact, trust_remote_code)
    places = destinations(model, list(tensors))
    found: dict[str, dict[tuple[int, int], TensorInfo]] = {}
    for name, place in places.items():
        if place is not None and (at := learned_place(name, place.pattern)) is not None:
            found.setdefault(place.parameter, {})[at] = tensors[name]
    if not found:
        return artifact
    check_stored(model, tensors, places, artifact.weights.index or artifact.weights.files[0])
    merged: dict[str, Merged] = {}
    for parameter, members in found.items():
        each = _merged(model, parameter, [members[at] for at in sorted(members)])
        if each is None:
            raise ArtifactError(
                f"'{artifact.root}': the experts of '{parameter}' are stored one by one, and transformers loads them "
                "from one tensor that cannot be put together here",
                "Quantize it with --layout compressed-tensors, or finalize the model it was made from",
            )
        merged[each.info.name] = each
    apart = {member.name for each in merged.values() for member in each.members}
    infos = {name: info for name, info in tensors.items() if name not in apart}
    infos |= {name: each.info for name, each in merged.items()}
    source: Any = ExpertsTogether(artifact.source, merged, infos)
    return replace(artifact, source=source)


def _merged(model: PreTrainedModel, parameter: str, members: list[TensorInfo]) -> Merged | None:
    """The tensor that transformers makes ``parameter`` of; None where matrices differ in more than their place."""
    owner, _, last = parameter.rpartition(".")
    first, shape = members[0], tuple(model.get_parameter(parameter).shape)
    name = re.sub(r"\.\d+\.[a-z]+_proj\.weight$", f".{last}", first.name)
    own = expert_layout(model.get_submodule(owner), last)
    place = destinations(model, [name])[name]
    layout = stored_layout(own, place.operations if place else (), shape, shape)
    if own is None or layout is None or len({member.dtype for member in members}) > 1:
        return None
    if layout.transposed != own.transposed:
        shape = (shape[0], shape[2], shape[1])
    nbytes = prod(shape) * torch_dtype(first.dtype).itemsize
    return Merged(TensorInfo(name, first.dtype, shape, first.file, 0, nbytes), tuple(members), layout)


@dataclass(frozen=True)
class ExpertsTogether:
    """A source (see `artifact.source`) whose experts are put together one after the other as they are read."""

    stored: Any = field(repr=False)
    merged: Mapping[str, Merged] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)

    def weights_of(self, info: TensorInfo) -> tuple[Packed | FlatTensor, ...]:
        """See `DecodedSource`."""
        if info.name not in self.merged:
            found: tuple[Packed | FlatTensor, ...] = self.stored.weights_of(info)
            return found
        members = self.merged[info.name].members
        return tuple(weight for member in members for weight in self.stored.weights_of(member))

    def tile(self, info: TensorInfo) -> int:
        return prod(info.shape[1:]) if info.name in self.merged else int(self.stored.tile(info))

    def read(
        self, info: TensorInfo, start: int = 0, stop: int | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        import torch

        if info.name not in self.merged:
            found: torch.Tensor = self.stored.read(info, start, stop, pinned=pinned)
            return found
        merged, size = self.merged[info.name], prod(info.shape[1:])
        last = info.numel if stop is None else stop
        first, each = start // size, len(merged.members) // info.shape[0]
        wanted = merged.members[first * each : -(-last // size) * each]
        experts = merged.put_together([self.stored.read(member) for member in wanted])
        values = torch.cat([expert.reshape(-1) for expert in experts])
        values = values[start - first * size : last - first * size]
        return values.view(info.shape) if stop is None else values

    @contextmanager
    def opened(self) -> Iterator[tuple[dict[str, Any], dict[str, FlatTensor]]]:
        with self.stored.opened() as (stored, flats):
            for name, merged in self.merged.items():
                parts = [stored.pop(member.name) for member in merged.members]
                stored[name] = _LazyMerged(merged, parts)
            yield stored, flats


class _LazyMerged:
    """A tensor of all experts before it is read. ``parts``: tensors or what transformers' loader takes for them."""

    def __init__(self, merged: Merged, parts: list[Any]) -> None:
        self.merged, self.parts = merged, parts

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.to()[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        import torch

        dtype = dtype or torch_dtype(self.merged.info.dtype)
        matrices = [part[...].to(device=device, dtype=dtype) for part in self.parts]
        return torch.stack(self.merged.put_together(matrices))

    def get_dtype(self) -> str:
        return self.merged.info.dtype

    def get_shape(self) -> list[int]:
        return list(self.merged.info.shape)

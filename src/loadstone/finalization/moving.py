"""A torchao artifact in the compressed-tensors layout: the same integers and scales in another container."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, FlatTensor, TensorInfo
from loadstone.artifact.compressed_tensors.merging import merged_sets
from loadstone.artifact.source import Source
from loadstone.artifact.torchao.flatten import SAFETENSORS_DTYPES, torch_dtype
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.division import divided
from loadstone.finalization.encoders.compressed_tensors import PackedEncoder, PackedEncoding
from loadstone.finalization.plan import FinalizePlan, Step
from loadstone.loading.meta import SavedRows
from loadstone.quantization.model_facts import LINEAR, ModelFacts
from loadstone.quantization.rules import Decision
from loadstone.quantization.schemes import Intx, Scheme, recipe_for
from loadstone.quantization.serving import layer_scheme, stored_rows
from loadstone.quantization.torchao_config import scheme_of
from loadstone.writing.index import in_shards

if TYPE_CHECKING:
    import torch

_SOURCE = "Finalize the unquantized model with --layout compressed-tensors"
# Rows in a tile of the scales of MX and NVFP4.
_TILE = 128


@dataclass(frozen=True)
class MovedEncoding(PackedEncoding):
    """A weight whose values are those of a torchao tensor: rows from ``first`` on of its ``parts`` in ``source``."""

    parts: dict[str, TensorInfo] = field(default_factory=dict, repr=False)
    first: int = 0
    source: Source | None = field(default=None, repr=False)

    moves = True
    shares_scale = False

    @property
    def rows_together(self) -> int:
        return 0

    @property
    def temporaries(self) -> int:
        return 1

    def encode(
        self, rows: torch.Tensor, first_row: int, extremes: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Iterator[tuple[str, torch.Tensor, int]]:
        parts = {"qdata": rows}
        for name, info in self.parts.items():
            if name != "qdata":
                parts[name] = self._rows(info, first_row, first_row + rows.shape[0])
        stored = stored_rows(self.layer, parts, torch_dtype(self.dtype), self.name)
        yield from self.placed(stored, first_row, rows.shape[0])
        if first_row == 0:
            for name, tensor in self._whole(parts).items():
                yield name, tensor, 0

    def _rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """The part of a stored tensor that belongs to rows ``start`` to ``stop`` of this weight."""
        assert self.source is not None
        if info.numel == 1:
            return self.source.read(info)
        total = prod(self.parts["qdata"].shape[:-1])
        start, stop = start + self.first, stop + self.first
        if prod(info.shape[:-1]) != total:
            # In tiles, each of 32 stored rows.
            size = info.numel // -(-total // _TILE)
            start, stop = start // _TILE, -(-stop // _TILE)
            return self.source.read(info, start * size, stop * size).view(-1, info.shape[-1])
        size = info.numel // total
        return self.source.read(info, start * size, stop * size).view(-1, size)


def plan_move(artifact: Artifact, *, max_shard_bytes: int, trust_remote_code: bool = False) -> FinalizePlan:
    """Plan to write a torchao artifact in the compressed-tensors layout; no value changes.

    Raises `UsageError` for tensors that servers have no kernel for, and where layers that servers merge differ,
    `ArtifactError` for tensors that scale their inputs.
    """
    from loadstone.loading.meta import meta_model, saved_rows
    from loadstone.quantization.model_facts import facts_of

    parts = {part.name for flat in artifact.quantized.values() for part in flat.parts.values()}
    plain = {name: info for name, info in sorted(artifact.tensors.items()) if name not in parts}
    steps = [Step((info,), name, (info._replace(begin=0, end=info.nbytes),)) for name, info in plain.items()]
    schemes = _schemes(artifact)
    model = meta_model(artifact, trust_remote_code)
    for name, flat in sorted(artifact.quantized.items()):
        if len(flat.shape) > 2 and artifact.weights.format != "safetensors":
            raise ArtifactError(f"tensor '{name}': experts are divided in safetensors only", _SOURCE)
        steps += _moved(artifact.source, name, flat, schemes[name], partial(saved_rows, model))
    _check_merged(steps, plain, artifact.source)
    facts = facts_of(model)
    encoder = PackedEncoder()
    stored = {step.name: step.encoding or step.outputs[0] for step in steps}
    recipes = [recipe_for(scheme) for scheme in dict.fromkeys(schemes.values())]
    decisions = _decisions(facts, schemes)
    config = artifact.config | encoder.config(recipes[0], None, decisions, stored)
    return FinalizePlan(
        artifact,
        recipes[0] if len(recipes) == 1 else None,
        "auto",
        in_shards(steps, max_shard_bytes),
        config,
        header=encoder.header({}),
        kind=encoder.kind,
        runs=encoder.runs(stored, config),
    )


def _schemes(artifact: Artifact) -> dict[str, Scheme]:
    """The scheme of every torchao tensor. Zero points say whether intx weights of a kind are asymmetric."""
    source = artifact.source
    flats = {name: source.describe(name) for name in artifact.quantized}
    shifted = {
        (flat.type, flat.nominal_bits)
        for flat in flats.values()
        if flat.type == "IntxUnpackedToInt8Tensor" and source.read(flat.parts["zero_point"]).any()
    }
    schemes = {
        name: scheme_of(flat, has_zero_points=(flat.type, flat.nominal_bits) in shifted)
        for name, flat in flats.items()
    }
    # One group a row may be a group size that is the layer's width: then it is that of the other layers.
    for name, scheme in schemes.items():
        if isinstance(scheme, Intx) and not scheme.group_size:
            grouped = replace(scheme, group_size=flats[name].shape[-1])
            schemes[name] = grouped if grouped in schemes.values() else scheme
    return schemes


def _moved(source: Source, name: str, flat: FlatTensor, scheme: Scheme, saved: SavedRows) -> list[Step]:
    """Steps for one torchao tensor, for each matrix in it. ``saved``: see `saved_rows`."""
    if "act_pre_scale" in flat.parts:
        raise ArtifactError(
            f"tensor '{name}' scales its inputs (awq or smoothquant), which this layout has no place for",
            _SOURCE,
        )
    flat = source.describe(name)
    if layer_scheme(scheme).measures_inputs:
        raise UsageError(
            f"tensor '{name}' rounds inputs to NVFP4, and servers want their range, which is measured on text",
            f"{_SOURCE} --calibrate FILE",
        )
    if flat.dtype is None:
        raise ArtifactError(f"tensor '{name}' does not say which dtype it stands for", _SOURCE)
    qdata, dtype = flat.parts["qdata"], SAFETENSORS_DTYPES[flat.dtype]
    whole = qdata._replace(name=name)
    matrices = [whole] if len(whole.shape) == 2 else divided(whole, saved(name, whole.shape))
    steps, first = [], 0
    for matrix in matrices:
        shape = (matrix.shape[0], flat.shape[-1])
        encoding = MovedEncoding(
            matrix.name, scheme, shape, dtype, parts=flat.parts, first=first, source=source
        )
        values = matrix._replace(name=qdata.name) if len(matrices) == 1 else matrix
        steps.append(Step((values,), matrix.name, encoding.outputs, encoding, "moved from torchao's layout"))
        first += matrix.shape[0]
    return steps


def _check_merged(steps: list[Step], plain: dict[str, TensorInfo], source: Source) -> None:
    """Raise `UsageError` where layers that servers merge have different schemes or scales of the whole tensor."""
    found: dict[str, Any] = {name.removesuffix(".weight"): None for name in plain if name.endswith(".weight")}
    for step in steps:
        if isinstance(step.encoding, MovedEncoding):
            whole = step.encoding.parts.get("per_tensor_scale")
            scale = float(source.read(whole)) if whole is not None else None
            found[step.name.removesuffix(".weight")] = (step.scheme, scale)
    for members in merged_sets(found):
        if len({found[module] for module in members}) > 1:
            raise UsageError(
                f"servers merge {', '.join(members)} into one layer, and their schemes or scales differ",
                _SOURCE,
            )


def _decisions(model: ModelFacts, schemes: dict[str, Scheme]) -> dict[str, Decision]:
    return {
        weight.name: Decision(
            schemes.get(weight.name), "", linear=weight.kind == LINEAR, table=weight.head or weight.table
        )
        for weight in model.weights
    }

"""What the steps of a plan make of their source tensors, block of rows by block of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from loadstone.artifact import TensorInfo
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.plan import QUANTIZE, FinalizePlan, Step
from loadstone.quantization.flatten import SAFETENSORS_DTYPES, describe, torch_dtype
from loadstone.quantization.quantize import (
    quantize_rows,
    quantize_weight,
    row_block,
    row_tile,
    whole_extremes,
)
from loadstone.quantization.schemes import (
    CALIBRATED,
    Int8DynActIntxWeight,
    IntxWeightOnly,
    rounding_of,
)

if TYPE_CHECKING:
    import torch

# Elements read, quantized or cast at once: bounds the float32 temporaries, whatever the tensor's size. torchao's own
# rounding makes four times as many as ours. A GPU needs more to be busy.
BLOCK = 1 << 20
GPU_BLOCK = 1 << 24


@dataclass(frozen=True)
class Unit:
    """A part of the work: elements ``start`` to ``stop`` of a step's source tensor ``number``, for output ``shard``.

    ``large``: they are quantized in one go though they are more than a block, since the recipe needs them together.
    """

    shard: int
    step: Step
    number: int
    start: int
    stop: int
    large: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the source that it covers."""
        source = self.step.sources[self.number]
        return source.nbytes * (self.stop - self.start) // source.numel


def units(plan: FinalizePlan, shard: int, device: str, divisible: bool) -> Iterator[Unit]:
    """The work of one output file. ``divisible``: whether parts of a source tensor can be read."""
    for step in plan.shards[shard]:
        whole = not divisible or bool(step.ready) or (step.scheme is not None and whole_extremes(step.scheme))
        for number, source in enumerate(step.sources):
            block = _block(step, number, device)
            size = source.numel if whole else block
            large = not _divides(step) and block > _elements(step, device)
            for start in range(0, source.numel, size or 1):
                yield Unit(shard, step, number, start, min(start + size, source.numel), large)


def _elements(step: Step, device: str) -> int:
    if device.startswith("cuda"):
        return GPU_BLOCK
    return (
        BLOCK if step.scheme is None or (rounding_of(step.scheme) == "affine" and _intx(step)) else BLOCK >> 2
    )


def _divides(step: Step) -> bool:
    return step.scheme is None or row_tile(step.scheme) > 0


def _intx(step: Step) -> bool:
    return isinstance(step.scheme, IntxWeightOnly | Int8DynActIntxWeight)


def _block(step: Step, number: int, device: str) -> int:
    """Elements of a source tensor that are made at once: whole rows where it is quantized."""
    source = step.sources[number]
    if step.action != QUANTIZE or not source.numel:
        return _elements(step, device)
    assert step.scheme is not None
    shape = (prod(source.shape[:-1]), source.shape[-1])
    return min(row_block(step.scheme, shape, _elements(step, device)), shape[0]) * shape[1]


def made(unit: Unit, values: torch.Tensor, device: str) -> Iterator[tuple[str, torch.Tensor, int]]:
    """What becomes of a unit's ``values`` (elements,): parts of stored tensors as (name, tensor, byte offset in it)."""
    step = unit.step
    if step.ready:
        from safetensors import safe_open

        with safe_open(step.ready, framework="pt") as file:
            for output in step.outputs:
                yield output.name, file.get_tensor(output.name), 0
        return
    if (rounding := rounding_of(step.scheme)) in CALIBRATED:
        raise UsageError(
            f"rounding={rounding} needs text to calibrate '{step.name}' with", "Add --calibrate FILE"
        )
    block = _block(step, unit.number, device)
    if step.action != QUANTIZE:
        target = torch_dtype(step.outputs[0].dtype)
        for at in range(0, len(values), block):
            yield step.name, values[at : at + block].to(target), (unit.start + at) * target.itemsize
        return
    assert step.scheme is not None
    width = step.sources[unit.number].shape[-1]
    before = sum(prod(s.shape[:-1]) for s in step.sources[: unit.number]) + unit.start // width
    names = json.loads(step.metadata)["_tensor_data_names"]
    target = torch_dtype(compute_dtype(step))
    extremes = _finite_extremes(unit, values) if whole_extremes(step.scheme) else None
    for at in range(0, len(values), block):
        rows = values[at : at + block].view(-1, width).to(device)
        row = before + at // width
        if extremes:
            low, high = (each.to(device, target) for each in extremes)
            parts = quantize_rows(rows.to(target), step.scheme, low, high)
        else:
            _finite_extremes(unit, rows)
            tensor = quantize_weight(rows.to(target), step.scheme)
            if row == 0 and len(step.sources) == 1 and len(step.source.shape) == 2:
                _check_class(step, tensor)
            parts = {name: getattr(tensor, name) for name in names}
        for output, name in zip(step.outputs, names, strict=True):
            if row == 0 or output.numel > 1:
                yield output.name, parts[name], _offset(step, output, row)


def _offset(step: Step, output: TensorInfo, row: int) -> int:
    """Where the bytes of ``row`` lie in a part: every row has as many, and tiles of rows are filled up to the last."""
    assert step.scheme is not None
    rows = sum(prod(s.shape[:-1]) for s in step.sources)
    tile = row_tile(step.scheme) or 1
    return output.nbytes * row // (rows if output.shape[:1] == (rows,) else -(-rows // tile) * tile)


def _finite_extremes(unit: Unit, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest value; raises `ArtifactError` when one of all is NaN or infinite."""
    import torch

    # Minimum and maximum keep a NaN, and take a tenth of the time of looking at every value.
    extremes = torch.aminmax(values)
    if not torch.stack(extremes).isfinite().all():
        source = unit.step.sources[unit.number]
        raise ArtifactError(
            f"{source.file}: tensor '{source.name}' holds NaN or infinity and cannot be quantized",
            "Use another checkpoint",
        )
    return extremes.min, extremes.max


def _check_class(step: Step, quantized: torch.Tensor) -> None:
    written = describe(quantized)
    if written != step.metadata:
        raise ArtifactError(f"tensor '{step.name}': torchao stored it otherwise than planned ({written})")


def compute_dtype(step: Step) -> str:
    """The floating dtype a weight is quantized in, as its metadata records it, in safetensors' spelling."""
    attributes = json.loads(step.metadata)["_data"]
    encoded = attributes.get("dtype") or attributes.get("orig_dtype")
    return SAFETENSORS_DTYPES[encoded["_data"]] if encoded else step.source.dtype

"""What the steps of a plan make of their source tensors, block of rows by block of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from loadstone.errors import ArtifactError, UsageError
from loadstone.finalize.plan import QUANTIZE, FinalizePlan, Step
from loadstone.quantization.flatten import SAFETENSORS_DTYPES, describe, torch_dtype
from loadstone.quantization.quantize import quantize_weight, row_block
from loadstone.quantization.schemes import CALIBRATED, rounding_of

if TYPE_CHECKING:
    import torch

# Elements read, quantized or cast at once: bounds the float32 temporaries, whatever the tensor's size. A GPU needs more
# of them to be busy.
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
        for number, source in enumerate(step.sources):
            block = _block(step, number, device)
            size = block if divisible and not step.ready else source.numel
            large = step.action == QUANTIZE and block > _elements(device)
            for start in range(0, source.numel, size or 1):
                yield Unit(shard, step, number, start, min(start + size, source.numel), large)


def _elements(device: str) -> int:
    return GPU_BLOCK if device.startswith("cuda") else BLOCK


def _block(step: Step, number: int, device: str) -> int:
    """Elements of a source tensor that are made at once: whole rows where it is quantized."""
    source = step.sources[number]
    if step.action != QUANTIZE or not source.numel:
        return _elements(device)
    assert step.scheme is not None
    shape = (prod(source.shape[:-1]), source.shape[-1])
    return min(row_block(step.scheme, shape, _elements(device)), shape[0]) * shape[1]


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
    width = step.sources[unit.number].shape[-1]
    # Every part holds as many bytes a row: the rows of earlier sources come first.
    before = sum(prod(s.shape[:-1]) for s in step.sources[: unit.number]) + unit.start // width
    rows_in_all = sum(prod(s.shape[:-1]) for s in step.sources)
    names = json.loads(step.metadata)["_tensor_data_names"]
    for at in range(0, len(values), block):
        quantized = _quantized(unit, values[at : at + block].view(-1, width), device)
        row = before + at // width
        if row == 0 and len(step.sources) == 1 and len(step.source.shape) == 2:
            _check_class(step, quantized)
        for output, name in zip(step.outputs, names, strict=True):
            yield output.name, getattr(quantized, name), output.nbytes * row // rows_in_all


def _quantized(unit: Unit, rows: torch.Tensor, device: str) -> torch.Tensor:
    import torch

    step = unit.step
    assert step.scheme is not None
    rows = rows.to(device)
    # Minimum and maximum keep a NaN, and take a tenth of the time of looking at every value.
    if not torch.stack(torch.aminmax(rows)).isfinite().all():
        source = step.sources[unit.number]
        raise ArtifactError(
            f"{source.file}: tensor '{source.name}' holds NaN or infinity and cannot be quantized",
            "Use another checkpoint",
        )
    return quantize_weight(rows.to(torch_dtype(compute_dtype(step))), step.scheme)


def _check_class(step: Step, quantized: torch.Tensor) -> None:
    written = describe(quantized)
    if written != step.metadata:
        raise ArtifactError(f"tensor '{step.name}': torchao stored it otherwise than planned ({written})")


def compute_dtype(step: Step) -> str:
    """The floating dtype a weight is quantized in, as its metadata records it, in safetensors' spelling."""
    attributes = json.loads(step.metadata)["_data"]
    encoded = attributes.get("dtype") or attributes.get("orig_dtype")
    return SAFETENSORS_DTYPES[encoded["_data"]] if encoded else step.source.dtype

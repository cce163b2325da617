"""The work of a finalize in units: a part of a source tensor, which is encoded block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import lcm, prod
from typing import TYPE_CHECKING

from loadstone.artifact import Source, TensorInfo
from loadstone.artifact.torchao.flatten import SAFETENSORS_DTYPES, torch_dtype
from loadstone.artifact.values import POSITIVE, check_tensor, surely_finite
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.plan import FinalizePlan, Step
from loadstone.writing.shards import file_order

if TYPE_CHECKING:
    import torch

# Elements read, encoded or cast at once: bounds the float32 temporaries, whatever the tensor's size. A GPU needs more
# to be busy.
BLOCK = 1 << 20
GPU_BLOCK = 1 << 24


@dataclass(frozen=True)
class Unit:
    """Elements ``start`` to ``stop`` of a step's source tensor ``number``, for output file ``shard``.

    ``large``: they are more than a block, and the encoding needs them all at once.
    """

    shard: int
    step: Step
    number: int
    start: int
    stop: int
    large: bool = False

    @property
    def source(self) -> TensorInfo:
        return self.step.sources[self.number]

    @property
    def nbytes(self) -> int:
        """Source bytes that the unit covers."""
        return self.source.nbytes * (self.stop - self.start) // self.source.numel


def units_of(plan: FinalizePlan, shard: int, device: str, reader: Source) -> Iterator[Unit]:
    """The units of one output file, in the order of its bytes, so that it can be hashed while it grows.

    Each is a part that ``reader`` can make apart from the others.
    """
    for step in sorted(plan.shards[shard], key=lambda step: min(map(file_order, step.outputs))):
        yield from step_units(step, shard, device, reader)


def step_units(step: Step, shard: int, device: str, reader: Source | None = None) -> Iterator[Unit]:
    """The units of one step. Rows that share a scale are one unit. ``reader``: None where the values are in memory."""
    encoding = step.encoding
    for number, source in enumerate(step.sources):
        block = _block(step, source, device)
        size, whole = block, 1
        if encoding and encoding.rows_together and not step.ready:
            size = whole = min(encoding.rows_together * source.shape[-1], source.numel)
        elif step.ready:
            size = source.numel
        elif encoding and encoding.row_multiple:
            whole = source.shape[-1] * encoding.row_multiple
        if reader and (tile := reader.tile(source)) > 1:
            # All of what a packed source decodes at once, and whole rows of what is written.
            tile = lcm(tile, max(whole, 1))
            size = -(-size // tile) * tile
        large = encoding is not None and not encoding.row_multiple and block > _limit(step, device)
        for start in range(0, source.numel, size or 1):
            yield Unit(shard, step, number, start, min(start + size, source.numel), large)


def _limit(step: Step, device: str) -> int:
    """Elements of a block."""
    if device.startswith("cuda"):
        return GPU_BLOCK
    return BLOCK // step.encoding.temporaries if step.encoding else BLOCK


def _block(step: Step, source: TensorInfo, device: str) -> int:
    """Elements of a source tensor that are encoded at once: whole rows where it is quantized."""
    limit = _limit(step, device)
    if step.encoding is None or not source.numel:
        return limit
    width = source.shape[-1]
    multiple = step.encoding.row_multiple
    rows = max(limit // (width * multiple), 1) * multiple if multiple else step.encoding.rows_together
    return min(rows * width, source.numel)


def encode_unit(
    unit: Unit, values: torch.Tensor, device: str, others: Iterable[tuple[torch.Tensor, torch.Tensor]] = ()
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Encode or cast a unit's ``values`` (elements,); yields (stored tensor's name, part of it, byte offset).

    ``others``: smallest and largest value of each tensor that the weight is merged with. Raises `ArtifactError` for a
    weight that holds NaN or infinity.
    """
    step, encoding = unit.step, unit.step.encoding
    if step.ready:
        from safetensors import safe_open

        with safe_open(step.ready, framework="pt") as file:
            for output in step.outputs:
                yield output.name, file.get_tensor(output.name), 0
        return
    block = _block(step, unit.source, device)
    if encoding is None:
        target = torch_dtype(step.outputs[0].dtype)
        for at in range(0, len(values), block):
            part = values[at : at + block].to(target)
            if not step.infinite:
                _check_plain(unit.source, part, target)
            yield step.name, part, (unit.start + at) * target.itemsize
        return
    if encoding.scheme.calibrated:
        raise UsageError(
            f"rounding={encoding.scheme.algorithm} needs text to calibrate '{step.name}' with",
            "Add --calibrate FILE",
        )
    width = unit.source.shape[-1]
    if encoding.moves:
        for at in range(0, len(values), block):
            rows = values[at : at + block].view(-1, width)
            yield from encoding.encode(rows, (unit.start + at) // width, None)
        return
    first = sum(prod(s.shape[:-1]) for s in step.sources[: unit.number]) + unit.start // width
    target = torch_dtype(encoding.dtype)
    extremes = None
    if encoding.rows_together and encoding.row_multiple:
        low, high = _finite_extremes(unit.source, values)
        for least, largest in others:
            low, high = low.minimum(least), high.maximum(largest)
        extremes = low.to(device, target), high.to(device, target)
    for at in range(0, len(values), block):
        rows = values[at : at + block].view(-1, width).to(device)
        if extremes is None and not surely_finite(rows):
            _finite_extremes(unit.source, rows)
        for name, part, offset in encoding.encode(rows.to(target), first + at // width, extremes):
            if "scale" in name.rpartition(".")[2]:
                _check_scale(name, part, unit.source)
            yield name, part, offset


def _check_plain(source: TensorInfo, part: torch.Tensor, target: torch.dtype) -> None:
    """Raise `ArtifactError` for a value that is not finite in the dtype that it is stored in."""
    if not target.is_floating_point or not part.numel() or surely_finite(part):
        return
    if target.itemsize == 1:
        return check_tensor(part, source)
    import torch

    # Minimum and maximum keep a NaN.
    if torch.stack(torch.aminmax(part)).isfinite().all():
        return
    stored = str(target).removeprefix("torch.")
    cast = torch_dtype(source.dtype) != target
    raise ArtifactError(
        f"{source.file}: tensor '{source.name}' holds NaN or infinity{f' as {stored}' if cast else ''}",
        "Use another checkpoint" + (", or --dtype bfloat16 for values beyond 65,504" if cast else ""),
    )


def _check_scale(name: str, part: torch.Tensor, source: TensorInfo) -> None:
    """Raise `ArtifactError` for scales that a load would refuse: not finite or, of a weight, not above zero."""
    dtype = SAFETENSORS_DTYPES.get(str(part.dtype).removeprefix("torch."))
    if dtype is None:
        return
    info = TensorInfo(name, dtype, tuple(part.shape), source.file, 0, part.nbytes)
    positive = name.endswith("weight_scale") and dtype in POSITIVE
    if surely_finite(part, positive=positive):
        return
    try:
        check_tensor(part.cpu(), info, {name: POSITIVE[dtype]} if positive else None)
    except ArtifactError as error:
        raise ArtifactError(
            f"{source.file}: tensor '{source.name}' cannot be quantized: {error.message.partition(': ')[2]}",
            "Leave it out with --skip, or choose another dtype or recipe",
        ) from None


def extremes_of(info: TensorInfo, reader: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest value of a source tensor, read block by block."""
    tile = max(reader.tile(info), 1)
    size = -(-BLOCK // tile) * tile
    found = [
        _finite_extremes(info, reader.read(info, start, min(start + size, info.numel)))
        for start in range(0, info.numel, size)
    ]
    low, high = found[0]
    for least, largest in found[1:]:
        low, high = low.minimum(least), high.maximum(largest)
    return low, high


def _finite_extremes(source: TensorInfo, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest value; raises `ArtifactError` when any value is NaN or infinite."""
    import torch

    # Minimum and maximum keep a NaN, and take a tenth of the time of looking at every value.
    extremes = torch.aminmax(values)
    if not torch.stack(extremes).isfinite().all():
        file = f"{source.file}: " if source.file else ""
        raise ArtifactError(
            f"{file}tensor '{source.name}' holds NaN or infinity and cannot be quantized",
            "Use another checkpoint",
        )
    return extremes.min, extremes.max

"""What one step of a plan makes of its source tensor, piece by piece."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import TYPE_CHECKING

from loadstone.errors import ArtifactError, UsageError
from loadstone.finalize.plan import QUANTIZE, Step
from loadstone.quantization.flatten import SAFETENSORS_DTYPES, flatten, torch_dtype
from loadstone.quantization.quantize import quantize_weight, row_block
from loadstone.quantization.schemes import CALIBRATED, rounding_of

if TYPE_CHECKING:
    import torch

# Elements quantized or cast at once: bounds the float32 temporaries, whatever the tensor's size. A GPU needs more of
# them to be busy.
BLOCK = 1 << 18
GPU_BLOCK = 1 << 25
# Blocks quantized at once on a CPU; reading, writing and hashing take cores too.
_WORKERS = 8


def pieces(
    step: Step, number: int, tensor: torch.Tensor, device: str
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """What a step makes of its source tensor ``number``: stored tensors as (name, tensor, byte offset in it)."""
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
    target = (
        torch_dtype(step.outputs[0].dtype) if step.action != QUANTIZE else torch_dtype(compute_dtype(step))
    )
    if step.action != QUANTIZE:
        if tensor.dtype == target or not tensor.numel():
            yield step.name, tensor.to(target), 0
            return
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), BLOCK):
            yield step.name, flat[start : start + BLOCK].to(target), start * target.itemsize
        return
    import torch

    assert step.scheme is not None
    fused = len(step.sources) > 1 or tensor.dim() > 2
    tensor = tensor.flatten(0, -2)
    block = row_block(step.scheme, tensor.shape, GPU_BLOCK if device.startswith("cuda") else BLOCK)
    # Every part holds as many bytes a row: the rows of earlier sources come first.
    before = sum(prod(s.shape[:-1]) for s in step.sources[:number])
    rows_in_all = sum(prod(s.shape[:-1]) for s in step.sources)
    names = json.loads(step.metadata)["_tensor_data_names"]
    offsets = {o.name: o.nbytes * before // rows_in_all for o in step.outputs}

    def made(start: int) -> torch.Tensor:
        rows = tensor[start : start + block].to(device)
        # Minimum and maximum keep a NaN, and take a tenth of the time of looking at every value.
        if not torch.stack(torch.aminmax(rows)).isfinite().all():
            source = step.sources[number]
            raise ArtifactError(
                f"{source.file}: tensor '{source.name}' holds NaN or infinity and cannot be quantized",
                "Use another checkpoint",
            )
        assert step.scheme is not None
        return quantize_weight(rows.to(target), step.scheme)

    starts = range(0, tensor.shape[0], block)
    for quantized in _in_order(made, starts, 1 if device.startswith("cuda") else _WORKERS):
        if not fused and len(starts) == 1:
            written = flatten(step.name, quantized)[0].metadata
            if written != step.metadata:
                raise ArtifactError(
                    f"tensor '{step.name}': torchao stored it otherwise than planned ({written})"
                )
        for output, name in zip(step.outputs, names, strict=True):
            part = getattr(quantized, name)
            yield output.name, part, offsets[output.name]
            offsets[output.name] += part.nbytes


def _in_order(
    work: Callable[[int], torch.Tensor], starts: Sequence[int], most: int
) -> Iterator[torch.Tensor]:
    """``work`` of each start, several at once where torch would take several threads: blocks are too small for more
    than one thread each, which would wait for each other longer than they compute."""
    import torch

    threads = torch.get_num_threads()
    workers = min(threads, most, len(starts))
    if workers == 1:
        yield from map(work, starts)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            ahead: deque[Future[torch.Tensor]] = deque()
            for start in starts:
                ahead.append(pool.submit(work, start))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    finally:
        torch.set_num_threads(threads)


def compute_dtype(step: Step) -> str:
    """The floating dtype a weight is quantized in, as its metadata records it, in safetensors' spelling."""
    attributes = json.loads(step.metadata)["_data"]
    encoded = attributes.get("dtype") or attributes.get("orig_dtype")
    return SAFETENSORS_DTYPES[encoded["_data"]] if encoded else step.source.dtype

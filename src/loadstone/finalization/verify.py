"""Encode every tensor of a finished artifact again from its source and compare it with the output byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from loadstone.artifact import detect
from loadstone.artifact.files import open_regular
from loadstone.artifact.manifest import verify_files
from loadstone.errors import ArtifactError
from loadstone.finalization.plan import FinalizePlan
from loadstone.finalization.stream import stream
from loadstone.finalization.units import Unit, units_of


def verify(
    plan: FinalizePlan, out: Path, *, device: str = "cpu", on_progress: Callable[[int], None] | None = None
) -> int:
    """Compare ``out`` with a fresh run of ``plan``, in the memory of one tensor; returns the tensors compared.

    Raises `ArtifactError` naming the first tensor, or file of the manifest, that differs.
    """
    import torch

    tensors = detect(out).tensors
    problems = verify_files(out)
    if problems:
        raise ArtifactError(f"'{out}': {problems[0]}", "Finalize again")
    reader = plan.source.source

    def compare(unit: Unit, name: str, part: torch.Tensor, offset: int) -> None:
        expected = part.cpu().contiguous().reshape(-1).view(torch.uint8)
        info = tensors[name]
        with open_regular(out / info.file, buffering=0) as file:
            file.seek(info.begin + offset)
            if file.read(expected.numel()) != expected.numpy().tobytes():
                raise ArtifactError(
                    f"{info.file}: tensor '{name}' differs from a fresh quantization of its source",
                    "Finalize again",
                )

    every = (unit for n in range(len(plan.shards)) for unit in units_of(plan, n, device, reader))
    with closing(stream(plan, every, reader, device, compare)) as done:
        for unit in done:
            if on_progress:
                on_progress(unit.nbytes)
    return sum(len(step.outputs) for step in plan.steps)

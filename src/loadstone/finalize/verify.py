"""Hold a finished artifact to its source: every tensor read back, made again, and compared byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loadstone.artifact import detect
from loadstone.artifact.manifest import verify_files
from loadstone.errors import ArtifactError
from loadstone.finalize.pieces import pieces
from loadstone.finalize.plan import FinalizePlan
from loadstone.loading.source import SourceReader


def verify(
    plan: FinalizePlan, out: Path, *, device: str = "cpu", on_progress: Callable[[int], None] | None = None
) -> int:
    """Compare ``out`` with a fresh run of ``plan``, in the memory of one tensor; returns the tensors compared.

    Raises `ArtifactError` naming the first tensor, or file of the manifest, that differs.
    """
    import torch

    written = detect(out).table
    problems = verify_files(out)
    if written is None or problems:
        raise ArtifactError(f"'{out}': {problems[0] if problems else 'no safetensors'}", "Finalize again")
    reader = SourceReader(plan.source)
    count = 0
    for step in plan.steps:
        for number, source in enumerate(step.sources):
            for name, piece, offset in pieces(step, number, reader.read(source), device):
                expected = piece.cpu().contiguous().reshape(-1).view(torch.uint8)
                info = written.tensors[name]
                with (out / info.file).open("rb") as file:
                    file.seek(info.begin + offset)
                    if file.read(expected.numel()) != expected.numpy().tobytes():
                        raise ArtifactError(
                            f"{info.file}: tensor '{name}' is not what its source quantizes to",
                            "Finalize again",
                        )
            if on_progress:
                on_progress(source.nbytes)
        count += len(step.outputs)
    return count

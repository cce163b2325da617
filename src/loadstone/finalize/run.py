"""Carry out a finalize plan: stream tensors from source to a temporary sibling directory, then rename it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone import __version__
from loadstone.artifact.manifest import FORMAT_VERSION, MANIFEST, sha256_file
from loadstone.errors import ArtifactError, MissingError, UsageError
from loadstone.finalize.plan import QUANTIZE, FinalizePlan, Step, torch_dtype
from loadstone.finalize.read import SourceReader
from loadstone.finalize.sidecars import copy_sidecars, find_sidecars
from loadstone.finalize.write import ShardWriter

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Tensors being read ahead or written behind the one being quantized.
_IN_FLIGHT = 2


@dataclass(frozen=True)
class Finalized:
    """What a finalize wrote."""

    out: Path
    plan: FinalizePlan
    seconds: float
    files: dict[str, str]


def finalize(
    plan: FinalizePlan,
    out: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Finalized:
    """Write the artifact that ``plan`` describes to ``out``, whole or not at all.

    ``on_progress`` is told the source bytes done since its last call. Raises `UsageError` for an output that
    exists, `MissingError` for too little disk space, `ArtifactError` for a damaged source.
    """
    started = time.monotonic()
    check_output(plan, out, overwrite)
    check_space(plan, out)
    work = out.with_name(f".{out.name}.partial")
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    try:
        with ThreadPoolExecutor(1) as hasher:
            source_hash = hasher.submit(plan.source.fingerprint)
            for number in range(len(plan.shards)):
                _write_shard(plan, number, work, device, on_progress)
            _write_index(plan, work)
            notes = copy_sidecars(find_sidecars(plan.source), work)
            for note in notes:
                log.warning("%s", note)
            (work / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
            files = _write_manifest(plan, work, source_hash.result())
        _publish(work, out, overwrite)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Finalized(out, plan, time.monotonic() - started, files)


def check_output(plan: FinalizePlan, out: Path, overwrite: bool) -> None:
    """Refuse an existing output, and one that is or lies inside the source (or the other way round)."""
    source, target = plan.source.root.resolve(), out.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
        raise UsageError(
            f"the output '{out}' and the source '{plan.source.root}' overlap", "Choose another output"
        )
    if out.exists() and not overwrite:
        raise UsageError(f"the output '{out}' exists", "Choose another, or pass --overwrite to replace it")
    if out.exists() and not out.is_dir():
        raise UsageError(f"the output '{out}' is a file", "Choose another")
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to '{parent}'", "Choose another output, or change its permissions")


def check_space(plan: FinalizePlan, out: Path) -> None:
    """Raise `MissingError` when the disk cannot hold the output."""
    parent = _existing_parent(out)
    free = shutil.disk_usage(parent).free
    need = plan.bytes_after + 64 * 2**20
    if free < need:
        raise MissingError(
            f"'{parent}' has {free / 1e9:.2f} GB free and the output needs {need / 1e9:.2f} GB",
            "Free some space, or choose another output",
        )


def _existing_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _write_shard(
    plan: FinalizePlan, number: int, work: Path, device: str, on_progress: Callable[[int], None] | None
) -> None:
    steps = plan.shards[number]
    writer = ShardWriter(
        work / plan.file_name(number), [o for s in steps for o in s.outputs], _metadata(plan)
    )
    reader = SourceReader(plan.source)
    writes: deque[Future[None]] = deque()
    try:
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
            ahead: deque[Future[torch.Tensor]] = deque()
            queue = iter(steps)
            for step in steps:
                while len(ahead) < _IN_FLIGHT and (upcoming := next(queue, None)) is not None:
                    ahead.append(reading.submit(reader.read, upcoming.source))
                outputs = _apply(step, ahead.popleft().result(), device)
                if len(writes) >= _IN_FLIGHT:
                    writes.popleft().result()
                writes.append(writing.submit(_write_all, writer, outputs))
                del outputs
                if on_progress:
                    on_progress(step.source.nbytes)
            for write in writes:
                write.result()
    finally:
        writer.close()


def _apply(step: Step, tensor: torch.Tensor, device: str) -> dict[str, torch.Tensor]:
    """The stored tensors that a step makes of its source tensor."""
    target = torch_dtype(step.outputs[0].dtype) if step.action != QUANTIZE else None
    if step.action != QUANTIZE:
        return {step.name: tensor if tensor.dtype == target else tensor.to(target)}
    from loadstone.quantization.flatten import flatten
    from loadstone.quantization.quantize import quantize_weight

    assert step.scheme is not None
    compute = torch_dtype(_compute_dtype(step))
    if not tensor.isfinite().all():
        raise ArtifactError(
            f"{step.source.file}: tensor '{step.source.name}' holds NaN or infinity and cannot be quantized",
            "Use another checkpoint",
        )
    flat, parts = flatten(step.name, quantize_weight(tensor.to(device=device, dtype=compute), step.scheme))
    if flat.metadata != step.metadata:
        raise ArtifactError(
            f"tensor '{step.name}': torchao stored it otherwise than planned ({flat.metadata})"
        )
    names = [o.name for o in step.outputs]
    return {name: part.cpu() for name, part in zip(names, parts.values(), strict=True)}


def _compute_dtype(step: Step) -> str:
    """The floating dtype a weight is quantized in, as its metadata records it, in safetensors' spelling."""
    from loadstone.quantization.flatten import SAFETENSORS_DTYPES

    attributes = json.loads(step.metadata)["_data"]
    encoded = attributes.get("dtype") or attributes.get("orig_dtype")
    return SAFETENSORS_DTYPES[encoded["_data"]] if encoded else step.source.dtype


def _write_all(writer: ShardWriter, outputs: dict[str, torch.Tensor]) -> None:
    for name, tensor in outputs.items():
        writer.write(name, tensor)


def _metadata(plan: FinalizePlan) -> dict[str, str]:
    """Header metadata, the same whole set in every shard: stock transformers merges it, vLLM reads each alone."""
    if plan.recipe is None:
        return {"format": "pt"}
    steps = plan.steps
    names = {"tensor_names": json.dumps([s.name for s in steps])}
    return {"format": "pt"} | names | {s.name: s.metadata for s in steps}


def _write_index(plan: FinalizePlan, work: Path) -> None:
    if len(plan.shards) == 1:
        return
    weight_map = {
        output.name: plan.file_name(number)
        for number, steps in enumerate(plan.shards)
        for step in steps
        for output in step.outputs
    }
    index = {"metadata": {"total_size": plan.bytes_after}, "weight_map": dict(sorted(weight_map.items()))}
    (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_manifest(plan: FinalizePlan, work: Path, source_hash: str) -> dict[str, str]:
    files = {str(p.relative_to(work)): sha256_file(p) for p in sorted(work.rglob("*")) if p.is_file()}
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": "torchao" if plan.recipe else "dense",
        "recipe": str(plan.recipe) if plan.recipe else None,
        "source": {"path": str(plan.source.path), "fingerprint": source_hash},
        "versions": versions(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "files": files,
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return files


def versions() -> dict[str, str]:
    """Versions of everything that decides an artifact's bytes."""
    import platform
    from importlib.metadata import version

    names = ("torch", "torchao", "transformers", "safetensors")
    return {"loadstone": __version__, "python": platform.python_version()} | {
        name: version(name) for name in names
    }


def _publish(work: Path, out: Path, overwrite: bool) -> None:
    """Make the output appear in one rename; what it replaces is set aside first and removed after."""
    if out.exists() and overwrite:
        old = out.with_name(f".{out.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        try:
            work.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)
    else:
        work.rename(out)
    directory = os.open(out.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)

"""Carry out a finalize plan: stream tensors from source to a temporary sibling directory, then rename it."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone import __version__
from loadstone.artifact.manifest import FORMAT_VERSION, MANIFEST, sha256_file
from loadstone.errors import MissingError, UsageError
from loadstone.finalize.journal import (
    close_journal,
    finished,
    has_progress,
    locked,
    note_finished,
    open_journal,
    work_directory,
)
from loadstone.finalize.pieces import pieces
from loadstone.finalize.plan import FinalizePlan
from loadstone.finalize.ranks import Ranks
from loadstone.finalize.read import SourceReader
from loadstone.finalize.sidecars import copy_sidecars, find_sidecars
from loadstone.finalize.write import ShardWriter

log = logging.getLogger(__name__)

# Pieces being written behind the one being quantized.
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
    resume: bool = True,
    ranks: Ranks | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Finalized:
    """Write the artifact that ``plan`` describes to ``out``, whole or not at all.

    A run that was killed left its finished shards behind; the same call takes them over unless ``resume`` is false.
    With several ``ranks`` each writes every size-th shard, and rank 0 the rest. ``on_progress`` is told the source
    bytes done since its last call. Raises `UsageError` for an output that exists, is being written by another
    process or belongs to another job, `MissingError` for too little disk space, `ArtifactError` for a damaged source.
    """
    started = time.monotonic()
    ranks = ranks or Ranks()
    check_output(plan, out, overwrite)
    work = work_directory(out)
    with locked(out) if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0:
            open_journal(plan, work, versions(), resume)
            check_space(plan, out, work)
        ranks.wait()
        try:
            files = _write_all_files(plan, work, device, ranks, on_progress)
            if ranks.rank == 0:
                _publish(work, out, overwrite)
        except OSError as error:
            _discard_unless_resumable(work, ranks)
            if error.errno == errno.ENOSPC:
                raise MissingError(
                    f"the disk of '{out.parent}' is full",
                    "Free some space and run again: finished shards are kept",
                ) from None
            raise
        except BaseException:
            _discard_unless_resumable(work, ranks)
            raise
        ranks.wait()
    return Finalized(out, plan, time.monotonic() - started, files)


def _discard_unless_resumable(work: Path, ranks: Ranks) -> None:
    if has_progress(work):
        log.info("finished shards are kept in %s: run the same command again to go on", work)
    elif ranks.rank == 0:
        shutil.rmtree(work, ignore_errors=True)


def _write_all_files(
    plan: FinalizePlan, work: Path, device: str, ranks: Ranks, on_progress: Callable[[int], None] | None
) -> dict[str, str]:
    with ThreadPoolExecutor(1) as hasher:
        source_hash = hasher.submit(plan.source.fingerprint) if ranks.rank == 0 else None
        notes: list[Future[None]] = []
        for number in range(ranks.rank, len(plan.shards), ranks.size):
            name = plan.file_name(number)
            if finished(work, name) is None:
                _write_shard(plan, number, work, device, on_progress)
                notes.append(hasher.submit(_note, work, name))
            elif on_progress:
                on_progress(sum(step.source.nbytes for step in plan.shards[number]))
        for note in notes:
            note.result()
        ranks.wait()
        if source_hash is None:
            return {}
        digests = close_journal(work)
        _write_index(plan, work)
        for message in copy_sidecars(find_sidecars(plan.source), work):
            log.warning("%s", message)
        (work / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
        return _write_manifest(plan, work, source_hash.result(), digests)


def _note(work: Path, name: str) -> None:
    note_finished(work, name, sha256_file(work / name))


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


def check_space(plan: FinalizePlan, out: Path, work: Path | None = None) -> None:
    """Raise `MissingError` when the disk cannot hold the output; what lies in ``work`` already counts as free."""
    parent = _existing_parent(out)
    held = sum(p.stat().st_blocks * 512 for p in work.iterdir()) if work is not None and work.exists() else 0
    free = shutil.disk_usage(parent).free + held
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
    """One output file: the next tensor is read, and the last piece written, while this one is quantized."""
    steps = plan.shards[number]
    writer = ShardWriter(
        work / plan.file_name(number), [o for s in steps for o in s.outputs], _metadata(plan)
    )
    reader = SourceReader(plan.source)
    writes: deque[Future[None]] = deque()
    try:
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
            ahead = reading.submit(reader.read, steps[0].source)
            for step, upcoming in zip(steps, [*steps[1:], None], strict=True):
                tensor = ahead.result()
                if upcoming is not None:
                    ahead = reading.submit(reader.read, upcoming.source)
                for piece in pieces(step, tensor, device):
                    if len(writes) >= _IN_FLIGHT:
                        writes.popleft().result()
                    writes.append(writing.submit(writer.write, *piece))
                    del piece
                del tensor
                if on_progress:
                    on_progress(step.source.nbytes)
            for write in writes:
                write.result()
    finally:
        writer.close()


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


def _write_manifest(
    plan: FinalizePlan, work: Path, source_hash: str, digests: dict[str, str]
) -> dict[str, str]:
    """``digests``: sha256 of the shards, known already."""
    paths = [p for p in sorted(work.rglob("*")) if p.is_file()]
    files = {
        name: digests.get(name) or sha256_file(work / name)
        for name in (str(p.relative_to(work)) for p in paths)
    }
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": "torchao" if plan.recipe else "dense",
        "recipe": str(plan.recipe) if plan.recipe else None,
        "source": {"path": str(plan.source.path), "fingerprint": source_hash},
        "versions": versions(),
        "command": ["loadstone", *sys.argv[1:]],
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

"""Carry out a finalize plan: stream tensors from source to a temporary sibling directory, then rename it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.manifest import FORMAT_VERSION, MANIFEST, versions
from loadstone.artifact.unchanged import check_unchanged
from loadstone.errors import ArtifactError, MissingError
from loadstone.finalization.journal import (
    KEY,
    can_resume,
    close_journal,
    finished,
    has_progress,
    hash_files,
    job_key,
    note_finished,
    output_in,
    start_journal,
    work_directory,
)
from loadstone.finalization.plan import FinalizePlan, Step
from loadstone.finalization.statistics import divide
from loadstone.finalization.stream import stream
from loadstone.finalization.units import Unit, units_of
from loadstone.ranks import Ranks
from loadstone.writing.filesystem import uninterrupted
from loadstone.writing.index import write_index
from loadstone.writing.publish import check_output, check_space, locked, publish
from loadstone.writing.shards import ShardWriter
from loadstone.writing.sidecars import copy_sidecars, find_sidecars

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Source bytes to process between two flushes to disk.
_FLUSH = 1 << 28
# Most shards that are hashed at once. A GPU fills as many at once, since hashing one takes longer than filling it.
_TOGETHER = 8


@dataclass(frozen=True)
class Finalized:
    """What a finalize wrote. ``files``: sha256 of each by name; ``verified``: tensors that were compared, if any."""

    out: Path
    plan: FinalizePlan
    seconds: float
    files: dict[str, str]
    verified: int | None = None


def write_plan(
    plan: FinalizePlan,
    out: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = True,
    ranks: Ranks | None = None,
    check: Callable[[Path], int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Finalized:
    """Write the artifact that ``plan`` describes to ``out``, whole or not at all.

    A run that was killed left its finished shards behind; the same call takes them over unless ``resume`` is false.
    With several ``ranks`` each writes some of the shards, and rank 0 the files beside them and runs ``check`` on the
    finished directory before it becomes ``out``; it returns the tensors that it compared. ``on_progress`` is called
    with the source bytes done since its last call. Raises `UsageError` for an output that exists, is being written by
    another process or belongs to another job, `MissingError` for too little disk space, `ArtifactError` for a damaged
    source.
    """
    started = time.monotonic()
    # Before the work, since it raises for a link that leaves the directory.
    sidecars = find_sidecars(plan.source)

    def write_rest(output: Path, digests: dict[str, str], fingerprint: str) -> dict[str, str]:
        for message in copy_sidecars(sidecars, output):
            log.warning("%s", message)
        (output / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
        files = _write_manifest(plan, output, fingerprint, digests)
        if check:
            verified.append(check(output))
        return files

    verified: list[int] = []
    files = write_artifact(
        plan,
        out,
        write_rest,
        device=device,
        overwrite=overwrite,
        resume=resume,
        ranks=ranks,
        on_progress=on_progress,
    )
    return Finalized(out, plan, time.monotonic() - started, files, *verified)


def write_artifact(
    plan: FinalizePlan,
    out: Path,
    write_rest: Callable[[Path, dict[str, str], str], dict[str, str]],
    *,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = True,
    ranks: Ranks | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Write the weights of ``plan`` as `write_plan` does, and other files beside them by ``write_rest``.

    Rank 0 calls ``write_rest(output, digests, fingerprint)`` with the directory that will be ``out``, the sha256 of
    each weight file in it, and the source's fingerprint. Returns its result; on other ranks an empty dict.
    """
    ranks = ranks or Ranks()
    check_output(plan.source.root, out, overwrite)
    _check_same(plan, ranks)
    work = work_directory(out)
    with locked(out, overwrite) if ranks.rank == 0 else nullcontext():
        resumes = ranks.rank != 0 or can_resume(plan, out, versions(), resume)
        try:
            if not resumes:
                start_journal(plan, out, versions())
            if ranks.rank == 0:
                check_space(plan.bytes_after, out, output_in(work))
            ranks.wait()
            files = _write_all_files(plan, work, write_rest, device, ranks, on_progress)
            if ranks.rank == 0:
                check_unchanged(plan.source.path, plan.source.stamp)
                # Last, since it shows which job the directory belongs to.
                (work / KEY).unlink()
                publish(output_in(work), out, overwrite)
        except BaseException as error:
            # What was made of a damaged source is not continued.
            if has_progress(work) and not isinstance(error, ArtifactError):
                log.info("finished shards are kept in %s: run the same command again to continue", work)
            elif ranks.rank == 0 and work.exists():
                with uninterrupted():
                    shutil.rmtree(work, ignore_errors=True)
            raise
        ranks.wait()
    return files


def _write_all_files(
    plan: FinalizePlan,
    work: Path,
    write_rest: Callable[[Path, dict[str, str], str], dict[str, str]],
    device: str,
    ranks: Ranks,
    on_progress: Callable[[int], None] | None,
) -> dict[str, str]:
    # Ranks divide the hashing of the source; copies of it with other times are hashed by one rank of their node.
    stamps = ranks.gather(plan.source.stamp)
    sharing = [rank for rank, stamp in enumerate(stamps) if stamp == stamps[0]]
    part, parts = (sharing.index(ranks.rank), len(sharing)) if ranks.rank in sharing else (0, 1)
    started = time.monotonic()
    # That takes long and must not delay noting finished shards, so it has its own thread.
    with ThreadPoolExecutor(1) as hasher:
        hashes = ranks.rank in sharing or ranks.local_rank == 0
        hashing = hasher.submit(plan.source.digests, part, parts) if hashes else None
        left = []
        for number in _own_shards(plan.shards, ranks):
            if finished(work, plan.file_name(number)) is None:
                left.append(number)
            elif on_progress:
                on_progress(sum(step.source_bytes for step in plan.shards[number]))
        _write_shards(plan, left, work, device, on_progress)
        wrote = time.monotonic()
        gathered = ranks.gather((hashing.result() if hashing else {}, gethostname()))
        hashed = {name: digest for rank in sharing for name, digest in gathered[rank][0].items()}
        for rank, (copy, host) in enumerate(gathered):
            if rank not in sharing and copy and copy != hashed:
                raise ArtifactError(
                    f"the source on {host} has other weights than that on {gathered[0][1]}",
                    "Copy it again, and start with --no-resume",
                )
        fingerprint = plan.source.fingerprint(hashed, check=True) if ranks.rank == 0 else ""
        log.debug(
            "rank %d wrote %d shards in %.2f s, then waited %.2f s for other ranks and for hashes of the source",
            ranks.rank,
            len(left),
            wrote - started,
            time.monotonic() - wrote,
        )
        if ranks.rank:
            return {}
        digests = close_journal(work, [plan.file_name(number) for number in range(len(plan.shards))])
        if len(plan.shards) > 1 or plan.indexed:
            files = {
                o.name: plan.file_name(n) for n, s in enumerate(plan.shards) for t in s for o in t.outputs
            }
            write_index(output_in(work), files, plan.bytes_after)
        return write_rest(output_in(work), digests, fingerprint)


def _own_shards(shards: Sequence[Sequence[Step]], ranks: Ranks) -> list[int]:
    """The numbers of the shards that this rank writes: all ranks read and write about as many bytes."""
    costs = {
        number: sum(step.source_bytes + sum(o.nbytes for o in step.outputs) for step in shard)
        for number, shard in enumerate(shards)
    }
    return [number for number, rank in sorted(divide(costs, ranks).items()) if rank == ranks.rank]


def own_bytes(shards: Sequence[Sequence[Step]], ranks: Ranks) -> int:
    """The source bytes of `_own_shards`, which progress counts."""
    return sum(step.source_bytes for number in _own_shards(shards, ranks) for step in shards[number])


def _check_same(plan: FinalizePlan, ranks: Ranks) -> None:
    """Raise `MissingError` for ranks that would do other work than rank 0: each has made the plan by itself."""
    key = job_key(plan, versions())
    # Copies of one source differ in times.
    del key["source"]
    keys = ranks.gather((key, gethostname()))
    for other, host in keys:
        differs = [name for name in key if other[name] != keys[0][0][name]]
        if differs:
            raise MissingError(
                f"the job on {host} is another than on {keys[0][1]} (its {', '.join(differs)} differ)",
                "Install the same versions and copy the same source on every node",
            )


def _write_shards(
    plan: FinalizePlan, numbers: list[int], work: Path, device: str, on_progress: Callable[[int], None] | None
) -> None:
    """Write the output files ``numbers``, each hashed as it grows; while one is synced, the next is being written."""
    reader = plan.source.source
    writers: dict[int, ShardWriter] = {}
    # Units of each shard that are not done.
    left: dict[int, int] = {}

    def parts() -> Iterator[Unit]:
        together = count if device.startswith("cuda") else 1
        # Of equal shares: a last shard that is filled alone is hashed alone.
        rounds = -(-len(numbers) // together)
        for turn in range(rounds):
            group = numbers[turn::rounds]
            for number in group:
                outputs = [o for step in plan.shards[number] for o in step.outputs]
                writers[number] = ShardWriter(output_in(work) / plan.file_name(number), outputs, plan.header)
                digests[number] = hashers.submit(writers[number].digest)
            units = {number: list(units_of(plan, number, device, reader)) for number in group}
            left.update({number: len(found) for number, found in units.items()})
            for row in zip_longest(*units.values()):
                yield from (unit for unit in row if unit is not None)

    def put(unit: Unit, name: str, part: torch.Tensor, offset: int) -> None:
        writers[unit.shard].write(name, part, offset)

    # The same threads for every shard: the memory that a new thread takes is never given back.
    count = max(min((os.cpu_count() or 1) // 4, _TOGETHER), 1)
    with (
        ThreadPoolExecutor(count) as hashers,
        ThreadPoolExecutor(count) as finishers,
        ThreadPoolExecutor(1) as syncer,
    ):
        digests: dict[int, Future[str]] = {}
        flushing: list[Future[None]] = []
        finishing: deque[Future[None]] = deque()

        def finish(number: int) -> None:
            closed = syncer.submit(writers.pop(number).close)
            digest = digests.pop(number)
            finishing.append(finishers.submit(_finish, work, plan.file_name(number), closed, digest))
            while len(finishing) > count:
                finishing.popleft().result()

        try:
            unflushed = 0
            with closing(stream(plan, parts(), reader, device, put)) as done:
                for unit in done:
                    left[unit.shard] -= 1
                    unflushed += unit.nbytes
                    if not left[unit.shard]:
                        finish(unit.shard)
                    elif unflushed > _FLUSH:
                        # The system reports a failed write once, to the first sync, so its result is checked too.
                        flushing.append(syncer.submit(writers[unit.shard].flush))
                        unflushed = 0
                    if on_progress:
                        on_progress(unit.nbytes)
            for number in list(writers):
                finish(number)
            for task in (*flushing, *finishing):
                task.result()
        except BaseException:
            for writer in writers.values():
                # Every one, since a thread that hashes its file waits for it.
                with suppress(OSError):
                    writer.close()
            raise


def _finish(work: Path, name: str, closed: Future[None], digest: Future[str]) -> None:
    """Note a shard once it is hashed and on disk."""
    closed.result()
    note_finished(work, name, digest.result())


def source_facts(source: Artifact, fingerprint: str) -> dict[str, Any]:
    """Where the tensors came from, for a manifest; of an adapter also what was merged, and into what."""
    facts: dict[str, Any] = {"path": str(source.path), "fingerprint": fingerprint}
    if source.decoded:
        # Quantized before: values were rounded to these number formats in turn.
        facts["decoded"] = list(source.decoded)
    if source.adapter is not None:
        facts["adapter"] = {"path": str(source.adapter.directory), "merged": str(source.adapter)}
    return facts


def _write_manifest(
    plan: FinalizePlan, output: Path, source_hash: str, digests: dict[str, str]
) -> dict[str, str]:
    files = hash_files(output, digests)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": plan.kind,
        "recipe": str(plan.recipe) if plan.recipe else None,
        "unquantized": plan.unquantized,
        "source": source_facts(plan.source, source_hash),
        "versions": versions(),
        "command": ["loadstone", *sys.argv[1:]],
        "files": files,
    }
    (output / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return files

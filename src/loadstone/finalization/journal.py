"""The working directory of a finalize, with a note for each finished shard, so that a killed run resumes.

``OUT`` is written as ``.OUT.partial/output`` and renamed at the end. Beside it, where no file of a source can have the
same name, lie the key of the job and the notes. A shard's note is written once its file is complete and synced; a run
with the same key (source, recipe, versions, layout) takes noted shards over as they are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from loadstone.artifact.hashing import sha256_file
from loadstone.errors import UsageError
from loadstone.finalization.plan import FinalizePlan
from loadstone.writing.filesystem import everything_in, sync_file
from loadstone.writing.publish import CALIBRATED, ENTRY, PARTIAL, name_taken, working_path

NOTES = "journal"
KEY = "key.json"


def work_directory(out: Path) -> Path:
    """The hidden sibling of ``out`` that holds `output_in` and the journal."""
    return working_path(out, PARTIAL)


def output_in(work: Path) -> Path:
    """The directory in a working directory that becomes the output, so that the last step is one rename."""
    return work / ENTRY


def calibration_directory(out: Path) -> Path:
    """Where the calibrated tensors of ``out`` are kept until they are written: a hidden sibling."""
    return working_path(out, CALIBRATED)


def discard_calibration(out: Path) -> None:
    """Remove the calibrated tensors, once the artifact is written."""
    shutil.rmtree(calibration_directory(out), ignore_errors=True)


def job_key(plan: FinalizePlan, versions: dict[str, str]) -> dict[str, str]:
    """What must be equal for a partial output to be continued; names are for the message about a mismatch."""
    source = hashlib.sha256(repr(plan.source.stamp).encode())
    layout = hashlib.sha256()
    for number, steps in enumerate(plan.shards):
        for step in steps:
            layout.update(f"{number}\0{step.name}\0{step.action}\0{step.scheme}\0{step.outputs}\n".encode())
    return {
        "source": f"{plan.source.path.resolve()} {source.hexdigest()}",
        "recipe": f"{plan.kind} {plan.recipe} {plan.config.get('quantization_config')}",
        "dtype": plan.dtype,
        "layout": layout.hexdigest(),
        "calibration": plan.calibration,
        "versions": json.dumps(versions, sort_keys=True),
    }


def can_resume(plan: FinalizePlan, out: Path, versions: dict[str, str], resume: bool) -> bool:
    """Whether the working directory of ``out`` has the same key, so that its shards are taken over; raises `UsageError`
    for one of another job, and for a directory that is not loadstone's."""
    work = work_directory(out)
    if not work.exists():
        return False
    key, found = job_key(plan, versions), _read(work / KEY)
    differs = [name for name in key if found.get(name) != key[name]]
    # Without notes the run was killed after `close_journal`, with other files half written.
    if resume and not differs and (work / NOTES).is_dir() and output_in(work).is_dir():
        return True
    if not found and not _is_ours(work):
        raise name_taken(work, out)
    if resume and differs and has_progress(work):
        raise UsageError(
            f"'{work}' holds a partial output of another job (its {', '.join(differs)} differ)",
            "Pass --no-resume to discard it, or choose another output",
        )
    return False


def start_journal(plan: FinalizePlan, out: Path, versions: dict[str, str]) -> None:
    """Make the working directory of ``out`` anew."""
    work = work_directory(out)
    if work.exists():
        shutil.rmtree(work)
    (work / NOTES).mkdir(parents=True)
    output_in(work).mkdir()
    _write(work / KEY, job_key(plan, versions))


def _is_ours(work: Path) -> bool:
    """Whether a directory without a key was left by a run killed before it wrote the key, or at its very end."""
    return {path.name for path in work.iterdir()} <= {NOTES, KEY, f"{KEY}.tmp", ENTRY}


def finished(work: Path, file: str) -> str | None:
    """The sha256 of a shard that an earlier run completed, None when it has to be written."""
    note = _read(work / NOTES / f"{file}.json")
    path = output_in(work) / file
    if note and path.is_file() and path.stat().st_size == note.get("bytes"):
        return str(note["sha256"])
    return None


def note_finished(work: Path, file: str, digest: str) -> None:
    """Record a shard whose bytes are on disk."""
    _write(
        work / NOTES / f"{file}.json", {"sha256": digest, "bytes": (output_in(work) / file).stat().st_size}
    )


def has_progress(work: Path) -> bool:
    """Whether any shard is finished, so that the partial output is worth keeping."""
    return (work / NOTES).is_dir() and any((work / NOTES).iterdir())


def close_journal(work: Path, files: Iterable[str]) -> dict[str, str]:
    """Remove the notes of a complete output; returns the sha256 of its ``files``. The key stays until the end."""
    # By name: what other nodes wrote to a shared directory may be listed late.
    digests = {file: str(_read(work / NOTES / f"{file}.json")["sha256"]) for file in sorted(files)}
    shutil.rmtree(work / NOTES)
    return digests


def hash_files(output: Path, digests: dict[str, str]) -> dict[str, str]:
    """The sha256 of every file of the output by relative name; ``digests``: those that are known already."""
    listed = (str(p.relative_to(output)) for p in everything_in(output) if p.is_file())
    names = dict.fromkeys((*listed, *digests))
    return {name: digests.get(name) or sha256_file(output / name) for name in names}


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w") as file:
        json.dump(content, file)
        file.flush()
        sync_file(file.fileno(), path.parent)
    partial.rename(path)

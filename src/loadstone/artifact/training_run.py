"""Training runs: a directory of ``checkpoint-N`` folders, and which of them to read."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path, PurePath

from loadstone.artifact.files import check_inside, is_file, read_json
from loadstone.errors import ArtifactError, UsageError

log = logging.getLogger(__name__)
TRAINER_STATE = "trainer_state.json"
# transformers writes checkpoint-900, accelerate checkpoint_3 (in checkpoints/), torchtitan step-900.
_CHECKPOINT = re.compile(r"(?:checkpoint[-_]|step-)(\d{1,18})")


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder's name is one that a trainer gives to checkpoints."""
    return _CHECKPOINT.fullmatch(name) is not None


def checkpoints(root: Path) -> list[Path]:
    """The ``checkpoint-N`` folders of a run, oldest first."""
    for folder in (root, root / "checkpoints"):
        if folder.is_dir():
            found = [
                (int(m[1]), p)
                for p in folder.iterdir()
                if (m := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()
            ]
            if found:
                return [p for _, p in sorted(found)]
    return []


def choose_checkpoint(root: Path, choice: str | None) -> tuple[Path, tuple[str, ...]]:
    """The directory to read and the evidence for it.

    ``root`` itself unless it is a run or ``choice`` names another.
    """
    found = checkpoints(root)
    if choice is None:
        if not found or _has_weights(root):
            return root, ()
        choice = "newest"
    if choice == "newest":
        if not found:
            raise UsageError(f"'{root}' has no checkpoint-N folder", "Leave out --checkpoint")
        # A checkpoint that was being written when the run died may hold no weights yet.
        whole = [p for p in found if _has_weights(p)]
        if not whole:
            raise ArtifactError(f"no checkpoint in '{root}' holds weights", "Name a directory that does")
        count = f"{len(found)} checkpoint{'s' if len(found) > 1 else ''}"
        newer = ", ".join(p.name for p in found[found.index(whole[-1]) + 1 :][-5:])
        if newer:
            log.warning("%s: passed over, no weights in it; reading %s", newer, whole[-1].name)
        check_inside(root, str(whole[-1].relative_to(root)))
        return whole[-1], (f"training run with {count}: newest is {whole[-1].name}",)
    if choice == "best":
        return _best(root, found)
    folder = found[0].parent if found else root
    names = (choice, *(f"{prefix}{choice}" for prefix in ("checkpoint-", "checkpoint_", "step-")))
    for candidate in (*(folder / n for n in names), Path(choice)):
        if candidate.is_dir():
            if candidate.is_relative_to(root):
                check_inside(root, str(candidate.relative_to(root)))
            return candidate, (f"checkpoint {candidate.name}, as asked",)
    listed = ", ".join(p.name for p in found[-5:]) or "none"
    raise UsageError(f"there is no checkpoint '{choice}' in '{root}'", f"It has: {listed}")


def _best(root: Path, found: list[Path]) -> tuple[Path, tuple[str, ...]]:
    for state_file in (root / TRAINER_STATE, *(p / TRAINER_STATE for p in reversed(found))):
        if not is_file(state_file):
            continue
        state = read_json(state_file)
        best = state.get("best_model_checkpoint")
        if not isinstance(best, str) or not best:
            continue
        # Recorded as the path on the training machine: the folder's name is what travels.
        name = PurePath(best.replace("\\", "/")).name
        if not is_checkpoint_name(name):
            raise ArtifactError(
                f"{state_file.name} names {ascii(best)[:80]}, which is not a checkpoint",
                "Choose one by its step",
            )
        path = (found[0].parent if found else root) / name
        if path.is_dir():
            check_inside(root, str(path.relative_to(root)))
            return path, (
                f"training run: {state_file.name} says {name} is best ({state.get('best_metric')})",
            )
        raise ArtifactError(
            f"the best checkpoint, {name}, is no longer in '{root}'", "Use --checkpoint newest"
        )
    raise ArtifactError(
        f"no {TRAINER_STATE} in '{root}' says which checkpoint is best", "Use --checkpoint newest"
    )


def _has_weights(directory: Path) -> bool:
    if not os.access(directory, os.R_OK | os.X_OK):
        raise ArtifactError(f"'{directory}' cannot be read (Permission denied)", "Check its permissions")
    patterns = (
        "model*.safetensors",
        "*.safetensors.index.json",
        "pytorch_model*.bin*",
        "adapter_model.*",
        ".metadata",
        "*/.metadata",
    )
    return any(
        p
        for pattern in patterns
        for p in directory.glob(pattern)
        if not p.parent.name.startswith("optimizer")
    )

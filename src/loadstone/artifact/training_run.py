"""Training runs: a directory of ``checkpoint-N`` folders, and which of them to read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from loadstone.errors import ArtifactError, UsageError

TRAINER_STATE = "trainer_state.json"


def checkpoints(root: Path) -> list[Path]:
    """The ``checkpoint-N`` folders of a run, oldest first."""
    found = [(int(m[1]), p) for p in root.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)) and p.is_dir()]
    return [p for _, p in sorted(found)]


def choose_checkpoint(root: Path, choice: str | None) -> tuple[Path, tuple[str, ...]]:
    """The directory to read and the evidence for it: ``root`` itself unless it is a run or ``choice`` names another."""
    found = checkpoints(root)
    if choice is None and ((root / "config.json").is_file() and _has_weights(root) or not found):
        return root, ()
    if choice in (None, "newest"):
        if not found:
            raise UsageError(f"'{root}' has no checkpoint-N folder", "Leave out --checkpoint")
        # A checkpoint that was being written when the run died has no trainer_state.json yet.
        whole = [p for p in found if _has_weights(p)]
        if not whole:
            raise ArtifactError(f"no checkpoint in '{root}' holds weights", "Name a directory that does")
        return whole[-1], (f"training run with {len(found)} checkpoints: newest is {whole[-1].name}",)
    assert choice is not None
    if choice == "best":
        return _best(root, found)
    for candidate in (root / choice, root / f"checkpoint-{choice}", Path(choice)):
        if candidate.is_dir():
            return candidate, (f"checkpoint {candidate.name}, as asked",)
    names = ", ".join(p.name for p in found[-5:]) or "none"
    raise UsageError(f"there is no checkpoint '{choice}' in '{root}'", f"It has: {names}")


def _best(root: Path, found: list[Path]) -> tuple[Path, tuple[str, ...]]:
    for state_file in (root / TRAINER_STATE, *(p / TRAINER_STATE for p in reversed(found))):
        if not state_file.is_file():
            continue
        try:
            state = json.loads(state_file.read_bytes())
        except ValueError:
            raise ArtifactError(f"{state_file} is not valid JSON", "Choose a checkpoint by its step") from None
        best = state.get("best_model_checkpoint")
        if best:
            # Recorded as the path on the training machine: the folder's name is what travels.
            path = root / Path(best).name
            if path.is_dir():
                return path, (f"training run: {state_file.name} says {path.name} is best ({state.get('best_metric')})",)
            raise ArtifactError(f"the best checkpoint, {path.name}, is no longer in '{root}'", "Use --checkpoint newest")
    raise ArtifactError(f"no {TRAINER_STATE} in '{root}' says which checkpoint is best", "Use --checkpoint newest")


def _has_weights(directory: Path) -> bool:
    patterns = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*/.metadata")
    return any(next(directory.glob(p), None) for p in patterns)

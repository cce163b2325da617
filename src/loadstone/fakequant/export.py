"""Carry out an export plan: tensors stream through, folded or as they are, into a directory that appears
whole."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import TensorInfo, detect
from loadstone.artifact.torchao.flatten import dtype_name, tensor_bytes, torch_dtype
from loadstone.errors import ArtifactError, MissingError
from loadstone.fakequant.package import config_text, copy_files
from loadstone.fakequant.plan import ExportPlan
from loadstone.fakequant.state import QuantizerState, write_manifests, write_state
from loadstone.finalization.plan import Step
from loadstone.finalization.units import encode_unit, step_units
from loadstone.loading.devices import quantize_device
from loadstone.quantization.schemes import Recipe
from loadstone.writing.index import write_index
from loadstone.writing.publish import check_space, new_directory
from loadstone.writing.shards import ShardWriter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Exported:
    """What an export wrote. ``files``: sha256 of each by name."""

    out: Path
    plan: ExportPlan
    quantizers: dict[str, str]
    seconds: float
    files: dict[str, str]


@dataclass(frozen=True)
class SideFiles:
    """What goes beside the weights: files to copy, and texts to write, by name; ``source`` is for the
    manifest."""

    source: dict[str, Any]
    copies: dict[str, Path]
    texts: dict[str, str]


def resolve_device(device: str, plan: ExportPlan) -> str:
    """``--device`` as a torch device.

    Raises `MissingError`, naming the first tensor, when CUDA is asked for and absent, and when a torchao recipe of
    the plan cannot be made there.
    """
    try:
        where = quantize_device(device)
    except MissingError as error:
        raise MissingError(
            f"{error.message}; tensor '{plan.folded[0].name}' was to be folded there", error.remedy
        ) from None
    tried: set[tuple[Recipe, str]] = set()
    for step in plan.folded:
        chosen = plan.format(step)
        recipe = chosen.weight if chosen else None
        if isinstance(recipe, Recipe) and (recipe, step.source.dtype) not in tried:
            tried.add((recipe, step.source.dtype))
            _check_folds(recipe, step, where)
    return where


def _check_folds(recipe: Recipe, step: Step, device: str) -> None:
    """A probe on one small weight, not a table: what runs depends on the card, the packages and their versions."""
    import torch

    from loadstone.fakequant.formats.fold import fold

    try:
        fold(step.name, torch.ones(256, 1024, dtype=torch_dtype(step.source.dtype), device=device), recipe)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        instead = f"Use {recipe.instead}" if recipe.instead else "Choose another format"
        raise MissingError(
            f"tensor '{step.name}' cannot be folded by {recipe} on {device} ({reason})", instead
        ) from None


def write_export(
    plan: ExportPlan,
    tensors: Iterable[tuple[str, torch.Tensor]],
    beside: SideFiles,
    out: Path,
    *,
    state: QuantizerState | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    emit_modelopt: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Exported:
    """Write the export of tensors that come one by one to ``out``, whole or not at all.

    ``tensors`` yields every source tensor once, on the CPU, in any order. ``device`` is where weights are
    folded, one at a time. ``emit_modelopt``: ModelOpt's state file too. ``on_progress`` is told the bytes
    written since its last call. Raises `UsageError` when another process is writing ``out``, `ArtifactError` or
    `MissingError`; ``out`` is then as it was.
    """
    started = time.monotonic()
    state = state or QuantizerState()
    check_space(plan.nbytes, out)
    with new_directory(out, overwrite) as work:
        _write_tensors(plan, tensors, work, device, on_progress)
        write_index(work, plan.files, plan.nbytes)
        files = write_side_files(plan, beside, work, state, {}, emit_modelopt=emit_modelopt)
    return Exported(out, plan, state.specs, time.monotonic() - started, files)


def write_side_files(
    plan: ExportPlan,
    beside: SideFiles,
    work: Path,
    state: QuantizerState,
    digests: dict[str, str],
    *,
    emit_modelopt: bool,
) -> dict[str, str]:
    """Write all but the weights and check the whole; returns the sha256 of each file. ``digests``: those known."""
    copy_files(beside.copies, work)
    for name, text in beside.texts.items():
        (work / name).write_text(text)
    (work / "config.json").write_text(config_text(plan.config))
    write_state(state, work)
    if emit_modelopt:
        from loadstone.fakequant.modelopt_state import write_modelopt_state

        write_modelopt_state(plan, state, work)
    files = write_manifests(plan, state, work, beside.source, digests)
    _verify(plan, work)
    return files


class _Writers:
    """One open file a shard, made on its first tensor and closed after its last."""

    def __init__(self, plan: ExportPlan, work: Path) -> None:
        self._files = plan.files
        self._infos: dict[str, list[TensorInfo]] = {}
        for step in plan.steps:
            self._infos.setdefault(self._files[step.name], []).extend(step.outputs)
        self._left = {file: {info.name for info in infos} for file, infos in self._infos.items()}
        self._open: dict[str, ShardWriter] = {}
        self._work = work

    def write(self, step: Step, tensor: torch.Tensor, device: str) -> None:
        file, name, source = self._files[step.name], step.name, step.source
        if name not in self._left[file]:
            raise ArtifactError(f"tensor '{name}' came twice", "This is a fault of the model or of loadstone")
        if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (source.dtype, source.shape):
            raise ArtifactError(
                f"tensor '{name}' is {dtype_name(tensor.dtype)} {list(tensor.shape)} and was announced as "
                f"{source.dtype} {list(source.shape)}",
                "The model changed while it was exported",
            )
        if file not in self._open:
            self._open[file] = ShardWriter(self._work / file, self._infos[file], {"format": "pt"})
        values = tensor.reshape(-1)
        for unit in step_units(step, 0, device):
            for part in encode_unit(unit, values[unit.start : unit.stop], device):
                self._open[file].write(*part)
        self._left[file].discard(name)
        if not self._left[file]:
            self._open.pop(file).close()

    @property
    def missing(self) -> list[str]:
        return sorted(name for names in self._left.values() for name in names)

    def close(self) -> None:
        for writer in self._open.values():
            writer.close()


def _write_tensors(
    plan: ExportPlan,
    tensors: Iterable[tuple[str, torch.Tensor]],
    work: Path,
    device: str,
    on_progress: Callable[[int], None] | None,
) -> None:
    import torch

    steps: dict[str, list[Step]] = {}
    for step in plan.steps:
        steps.setdefault(step.source.name, []).append(step)
    tied = {*plan.aliases, *plan.aliases.values()}
    seen: dict[str, bytes] = {}
    writers = _Writers(plan, work)
    try:
        # Per thread, so entered here and not by the caller; the model's own tensors stay as they are.
        with torch.no_grad():
            for key, tensor in tensors:
                if key in tied:
                    seen[key] = digest(tensor)
                if key not in steps and key not in plan.aliases:
                    raise ArtifactError(f"tensor '{key}' came and is not in the plan", "Export again")
                for step in steps.get(key, ()):
                    writers.write(step, tensor, device)
                    if on_progress:
                        on_progress(step.nbytes)
                # Or it would still be held while the next one is read.
                del tensor
        if writers.missing:
            names = ", ".join(writers.missing[:10])
            raise ArtifactError(
                f"{len(writers.missing)} tensors never came: {names}", "Export from the directory"
            )
    finally:
        writers.close()
    refuse_unequal(plan.aliases, seen)


def digest(tensor: torch.Tensor) -> bytes:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).digest()


def refuse_unequal(aliases: dict[str, str], digests: dict[str, bytes]) -> None:
    """Raise `ArtifactError` for tensors that would become one and differ."""
    for target, source in aliases.items():
        if digests.get(target) != digests.get(source):
            raise ArtifactError(
                f"'{target}' and '{source}' are tied by the config and their values differ",
                "Set tie_word_embeddings to false in config.json, or remove the one that is not used",
            )


def _verify(plan: ExportPlan, work: Path) -> None:
    """Read back every header: the names of the plan and no other, in the files of the index, as many
    bytes."""
    found = {n: (t.dtype, t.shape, t.file) for n, t in detect(work).tensors.items()}
    files = plan.files
    planned = {o.name: (o.dtype, o.shape, files[o.name]) for s in plan.steps for o in s.outputs}
    wrong = sorted(n for n in {*found, *planned} if found.get(n) != planned.get(n))
    if wrong:
        raise ArtifactError(f"tensor '{wrong[0]}' was not written as planned", "Export again")

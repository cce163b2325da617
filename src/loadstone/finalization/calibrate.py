"""Calibrated rounding, one decoder layer at a time: memory holds that layer, its inputs and their statistics.

Each layer is calibrated on the outputs of the rounded layers before it. Ranks divide the rows of text, and the Linears
and experts of each layer (`round_layer`); `gptq` and `smooth` hold the algorithms.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.manifest import versions
from loadstone.errors import UsageError
from loadstone.finalization.experts import FEWEST, Stored, plainly, use_experts
from loadstone.finalization.journal import calibration_directory, output_in, work_directory
from loadstone.finalization.layers import PLAIN, Laps, layer_calls
from loadstone.finalization.plan import FinalizePlan, Step
from loadstone.finalization.ranges import measure_inputs, measured_parameters, with_ranges
from loadstone.finalization.round_layer import Rows, round_layer
from loadstone.ranks import Ranks
from loadstone.writing.publish import check_space
from loadstone.writing.shards import write_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
# Tokens of one calibration sequence.
_ROW_TOKENS = 512


def calibrate(
    plan: FinalizePlan,
    rows: torch.Tensor,
    out: Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    ranks: Ranks | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> FinalizePlan:
    """Round every calibrated weight on ``rows``, token ids (rows, length); returns the plan with its steps ready.

    Results go beside ``out``, files for each layer; those that a killed run finished for the same tokens, weights and
    recipe are taken over, whatever the number of its ``ranks``, which does not change a bit of the result.
    ``on_progress(done, total)`` counts layers. Raises `UsageError` when nothing in
    the plan is calibrated, `MissingError` for too little disk space, `ArtifactError` for a model whose layers cannot be
    run one by one or allow no scaling of inputs.
    """
    import torch

    from loadstone.loading import plan as load_plan
    from loadstone.loading.streamed import streamed

    ranks = ranks or Ranks()
    wanted = _wanted(plan)
    if not wanted:
        raise UsageError(
            f"{plan.recipe} rounds nothing by calibration", "Use an intx recipe: intx4-weight-only"
        )
    source = load_plan(plan.source, dtype="float32", trust_remote_code=trust_remote_code)
    folder = calibration_folder(plan, rows, out, ranks)
    few: list[str] = []
    whole = Laps(device)
    with streamed(source, torch.device(device)) as model, torch.no_grad():
        prefix = model.stack_name
        steps = _steps_by_parameter(plan, model.model)
        calibrated_here = {
            step.name for name, found in steps.items() if name.startswith(f"{prefix}.") for step in found
        }
        outside = [step for name, step in wanted.items() if name not in calibrated_here]
        _check_outside(outside, prefix, ranks)
        if len(outside) == len(wanted):
            raise UsageError(
                f"no weight that {plan.recipe} quantizes is part of a decoder layer ({prefix})", PLAIN
            )
        if ranks.rank == 0:
            needed = plan.bytes_after + sum(s.nbytes for s in wanted.values())
            check_space(needed, out, output_in(work_directory(out)), folder)
            folder.mkdir(parents=True, exist_ok=True)
        hidden, calls = layer_calls(model.model.base_model, model.stack, rows, device, ranks)
        whole.lap("before the layers")
        for number in range(len(model)):
            laps = Laps(device)
            start, layer = f"{prefix}.{number}.", model.layer(number)
            laps.lap("read")
            found = {n.removeprefix(start): s for n, s in steps.items() if n.startswith(start)}
            inside = {n: s[0] for n, s in found.items() if len(s) == 1 and not s[0].first_row}
            experts = {n: s for n, s in found.items() if n not in inside}
            mine = Rows(hidden, calls[number], (rows.shape[0], rows.shape[1]), device, ranks)
            if any(step.name in wanted for each in found.values() for step in each):
                files = _finished(folder, number, ranks)
                if not files:
                    parts = round_layer(layer, inside, experts, mine)
                    laps.lap("round")
                    files = _finish(parts, folder, number, ranks)
                    del parts
                    laps.lap("write")
                with _stored(files) as stored:
                    _use_rounded(layer, inside, stored, device)
                    few += use_experts(layer, experts, stored, device)
                laps.lap("load")
            hidden = mine.run(layer)
            del layer
            laps.lap("run")
            log.debug("layer %d: %s", number, laps)
            if on_progress:
                on_progress(number + 1, len(model))
        whole.lap("layers")
    log.debug("calibrated: %s", whole)
    if few and ranks.rank == 0:
        log.warning(
            "%d matrices of experts saw fewer than %d calibration tokens and are rounded without text; the first: '%s'",
            len(few),
            FEWEST,
            few[0],
        )
    return calibrated(plan, folder, ranks)


def _finished(folder: Path, number: int, ranks: Ranks) -> list[Path]:
    """The files of a layer that a run finished, else none. Rank 0 looks: others may see a shared directory late."""
    note = folder / f"{number:05d}.json"
    found = json.loads(note.read_text()) if ranks.rank == 0 and note.is_file() else []
    return [folder / name for name in ranks.from_first(found)]


def _finish(parts: dict[str, torch.Tensor], folder: Path, number: int, ranks: Ranks) -> list[Path]:
    """Write this rank's tensors of a layer, and when all ranks have, the note that names their files."""
    name = f"{number:05d}-{ranks.rank:05d}.safetensors" if parts else ""
    if parts:
        partial = folder / f"{name}.{os.getpid()}.partial"
        write_tensors(partial, parts)
        partial.replace(folder / name)
    names = [each for each in ranks.gather(name) if each]
    if ranks.rank == 0:
        partial = folder / f"{number:05d}.json.partial"
        partial.write_text(json.dumps(names))
        partial.replace(folder / f"{number:05d}.json")
    return [folder / each for each in names]


@contextmanager
def _stored(files: list[Path]) -> Iterator[Stored]:
    """What reads each tensor in ``files``, by its name."""
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        yield {name: partial(file.get_tensor, name) for file in opened for name in file.keys()}  # noqa: SIM118


def _steps_by_parameter(plan: FinalizePlan, model: PreTrainedModel) -> dict[str, list[Step]]:
    """The steps of each parameter of the model: one, or of merged experts one for each matrix."""
    from loadstone.loading.meta import destinations

    places = destinations(model, list({step.source.name for step in plan.steps}))
    found: dict[str, list[Step]] = {}
    for step in plan.steps:
        place = places[step.source.name]
        parameter = step.parameter or (place.parameter if place and not place.converted else "")
        if parameter and (step.parameter or parameter not in found):
            found.setdefault(parameter, []).append(step)
    return found


def calibrate_plan(
    plan: FinalizePlan,
    text: str | Path | Sequence[str],
    tokens: int,
    out: Path,
    device: str,
    ranks: Ranks,
    trust_remote_code: bool,
    on_progress: Callable[[int, int], None] | None = None,
) -> FinalizePlan:
    """The plan with its weights rounded, and the ranges of inputs measured, on the first ``tokens`` tokens of ``text``,
    which rank 0 reads; see `calibrate` and `measure_inputs`."""
    import torch

    mine = calibration_rows(plan, text, tokens, trust_remote_code) if ranks.rank == 0 else None
    rows = ranks.from_first(mine)
    folder = calibration_folder(plan, rows, out, ranks)
    options: dict[str, Any] = {
        "device": device,
        "trust_remote_code": trust_remote_code,
        "ranks": ranks,
        "on_progress": on_progress if ranks.rank == 0 else None,
    }
    # Some libraries' kernels run on the current GPU, wherever their tensors are.
    with torch.cuda.device(device) if device.startswith("cuda") else nullcontext():
        measure_inputs(plan, rows, folder, **options)
        if _wanted(plan) or not measured_parameters(plan):
            plan = calibrate(plan, rows, out, **options)
    return with_ranges(replace(plan, calibration=folder.name), folder, ranks)


def calibration_rows(
    plan: FinalizePlan, text: str | Path | Sequence[str], tokens: int, trust_remote_code: bool = False
) -> torch.Tensor:
    """Token ids (rows, length), at most 512 a row, of the first ``tokens`` tokens of ``text``, in order.

    ``text``: a file or data set as `read_corpus` takes it, or documents. Raises `UsageError` for too little text.
    """
    import torch

    from loadstone.loading.loader import load_tokenizer, using
    from loadstone.loading.model_class import load_config
    from loadstone.loading.positions import positions
    from loadstone.text.corpus import read_corpus
    from loadstone.text.tokenizing import require_known

    tokenizer = load_tokenizer(plan.source, trust_remote_code=trust_remote_code)
    length = min(_ROW_TOKENS, positions(load_config(plan.source, trust_remote_code)).limit or _ROW_TOKENS)
    documents = read_corpus(str(text)).documents if isinstance(text, str | Path) else text
    ids: list[int] = []
    for document in documents:
        with using(tokenizer):
            ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // length
    if count == 0:
        name = f"'{text}'" if isinstance(text, str | Path) else "the calibration text"
        raise UsageError(
            f"{name} gives {min(len(ids), tokens)} calibration tokens", f"At least {length} are needed"
        )
    rows = torch.tensor(ids[: count * length]).view(count, length)
    known = (plan.config | (plan.config.get("text_config") or {})).get("vocab_size")
    if isinstance(known, int):
        require_known(int(rows.max()), known, tokenizer, str(plan.source.root))
    return rows


def calibrated(plan: FinalizePlan, folder: Path, ranks: Ranks) -> FinalizePlan:
    """The plan with the results of a finished `calibrate` in ``folder``, on every rank."""
    ready: dict[str, str] = {}
    if ranks.rank == 0:
        for note in sorted(folder.glob("[0-9]*.json")):
            for file in json.loads(note.read_text()):
                with _stored([folder / file]) as stored:
                    ready |= dict.fromkeys(stored, str(folder / file))
    ready = ranks.from_first(ready)
    shards = tuple(tuple(_with_result(s, ready) for s in shard) for shard in plan.shards)
    return replace(plan, shards=shards, calibration=folder.name)


def _with_result(step: Step, ready: dict[str, str]) -> Step:
    """The step with its calibrated tensors, or rounded without text if it is outside of the decoder layers."""
    file = ready.get(step.outputs[0].name, "")
    if not file and step.encoding and step.encoding.scheme.calibrated:
        return replace(plainly(step), reason=f"{step.reason}, rounded without text")
    return replace(step, ready=file)


def _check_outside(outside: list[Step], prefix: str, ranks: Ranks) -> None:
    """Warn about weights that are not in a decoder layer; raise `UsageError` for those that need text."""
    for step in outside:
        if step.encoding and step.encoding.scales_inputs:
            raise UsageError(
                f"'{step.name}' is not in a decoder layer ({prefix}): it cannot be calibrated",
                "Give it the rule `skip`, or rounding=affine, in a recipe file",
            )
    if outside and ranks.rank == 0:
        log.warning(
            "%d weights outside of the decoder layers (%s) are rounded without calibration, the first is '%s'",
            len(outside),
            prefix,
            outside[0].name,
        )


def _wanted(plan: FinalizePlan) -> dict[str, Step]:
    return {s.name: s for s in plan.steps if s.scheme and s.scheme.calibrated}


def _use_rounded(layer: torch.nn.Module, inside: dict[str, Step], stored: Stored, device: str) -> None:
    """Load the rounded weights into the layer, so that later layers are calibrated on its real outputs."""
    for name, step in inside.items():
        if step.outputs[0].name not in stored:
            continue
        tensors = {output.name: stored[output.name]().to(device) for output in step.outputs}
        value = step.encoding.dequantize(tensors) if step.encoding else tensors[step.name]
        parameter = layer.get_parameter(name)
        parameter.data = value.to(parameter.dtype)


def calibration_folder(plan: FinalizePlan, rows: torch.Tensor, out: Path, ranks: Ranks) -> Path:
    """A place for this calibration: other tokens, weights, recipes or versions never share files. Of several ranks the
    first names it, since copies of one source differ in times."""
    names = [step.name for step in plan.steps if step.scheme]
    text = json.dumps(
        [plan.kind, str(plan.recipe), names, plan.dtype, plan.source.stamp, list(rows.shape), versions()]
    )
    digest = hashlib.sha256(text.encode() + rows.numpy().tobytes()).hexdigest()
    return calibration_directory(out) / str(ranks.from_first(digest[:16]))

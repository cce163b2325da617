"""An evaluation on text, from options to records: plan, tokenize, score each model, compare, check the gates."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from loadstone.errors import UsageError
from loadstone.evaluation.harness.tasks import TaskScore, task_manager, task_records
from loadstone.evaluation.loaded import LoadedModel, choose_streaming, input_device, open_model
from loadstone.evaluation.models import EvalModel, plan_models
from loadstone.evaluation.options import DEFAULT_CACHE, Options
from loadstone.evaluation.parallel import divide_models
from loadstone.evaluation.passes import (
    EvalContext,
    run_extras,
    score_alone,
    score_with_reference,
)
from loadstone.evaluation.ranks import device_of
from loadstone.evaluation.record import Cost, make_record
from loadstone.evaluation.result import Evaluation
from loadstone.evaluation.results.compare import difference, measure, require_same
from loadstone.evaluation.results.documents import divergence_record, worst_documents
from loadstone.evaluation.results.gates import Verdict, check_gates, judge
from loadstone.evaluation.results.metrics import TEXT_GROUPS
from loadstone.evaluation.results.saved import Saved, read_saved
from loadstone.evaluation.results.store import open_store
from loadstone.evaluation.results.tables import describe
from loadstone.evaluation.scoring.losses import Values
from loadstone.evaluation.task import make_task
from loadstone.loading.loader import import_libraries
from loadstone.progress import Progress, no_progress
from loadstone.ranks import joined

log = logging.getLogger(__name__)
_PATIENCE = 5.0


def run(options: Options, progress: Progress = no_progress) -> Evaluation:
    """Evaluate models on text. ``progress(label, total)`` opens a progress bar that counts tokens.

    Raises UsageError for options that contradict each other, ArtifactError for a model that cannot be loaded as it is.
    """
    check_gates(options.gates, TEXT_GROUPS, "a language model")
    if not options.compares:
        for gate in options.gates:
            if gate.compares:
                raise UsageError(
                    f"--fail-if '{gate.text}' needs a baseline", "Add --baseline DIR or a second -M"
                )
        if options.divergence:
            raise UsageError("--kl needs a reference model", "Add --baseline DIR or a second -M")
    if options.tasks:
        # Unknown tasks are reported now, not after the text was scored.
        task_manager(options.tasks, options.task_path)
    elif options.task_path is not None:
        raise UsageError("--task-path is for --tasks", "Name the tasks, or leave it out")
    saved = None
    if options.baseline is not None and Path(options.baseline).is_file():
        saved = read_saved(options.baseline)
        if options.measures_divergence:
            raise UsageError(
                "KL divergence needs the baseline itself, not a saved result", "Name its directory"
            )
        dtype = saved.protocol.dtype if options.dtype == "auto" else options.dtype
        options = replace(options, baseline=None, dtype=dtype)
    # Before transformers brings in torchao by itself, with its notices.
    import_libraries()
    store = open_store(options.cache or DEFAULT_CACHE) if options.cache or options.resume else None
    with joined() as ranks, ThreadPoolExecutor(1) as pool:
        models = plan_models(options, device_of(ranks, options.device), referenced=saved is not None)
        models, ranks = divide_models(models, options, ranks)
        streams = choose_streaming(models, options)
        if streams and options.compile:
            log.warning("--compile has no effect on models that are streamed layer by layer")
        options = replace(options, stream=streams, compile=compile_mode(models, options, streams, saved))
        # The text is read and tokenized while the first model loads.
        making = pool.submit(make_task, options, models, progress if ranks.first else no_progress)
        if options.compile is None:
            compiles = making.result().protocol.compiled
            if compiles:
                log.info("compiling the layers: the text is long enough (--no-compile computes without)")
            options = replace(options, compile=compiles)
        context = EvalContext(options, making, store, ranks, progress)
        # A wrong option shows within seconds; only a long text is still being tokenized after that.
        if wait([making], timeout=_PATIENCE).done:
            making.result()
        if saved is not None:
            # Before anything is computed.
            require_same(making.result().protocol, saved.protocol, (models[0].name, saved.record["path"]))
        score = _score_with_divergence if options.measures_divergence else _score_alone
        values, costs = score(context, models)
        extras = {m.name: run_extras(context, m, costs[m.name].batch_size) for m in models}
        # A rank that ended early would look like a failure to the launcher.
        ranks.wait()
        return _report(context, models, values, costs, extras, saved)


def compile_mode(
    models: tuple[EvalModel, ...], options: Options, streams: bool, saved: Saved | None
) -> bool | None:
    """Whether to compile, where that is known before the text is; None to decide by the text's length."""
    if streams or models[0].mesh is not None:
        return False
    if options.compile is not None:
        return options.compile
    if saved is not None:
        # The losses of the two modes do not compare.
        return saved.protocol.compiled
    plain = any(model.prefix is not None or model.has_quantizers for model in models)
    divided = models[0].plan.device == "auto" and torch.cuda.device_count() > 1
    return False if plain or divided or input_device(models[0].plan).type != "cuda" else None


def _score_alone(
    context: EvalContext, models: tuple[EvalModel, ...]
) -> tuple[dict[str, Values], dict[str, Cost]]:
    """One model in memory at a time."""
    values, costs = {}, {}
    for model in models:
        values[model.name], costs[model.name] = score_alone(context, model)
    return values, costs


def _score_with_divergence(
    context: EvalContext, models: tuple[EvalModel, ...]
) -> tuple[dict[str, Values], dict[str, Cost]]:
    """The reference stays in memory; the others are loaded beside it, one at a time."""
    reference = models[0]
    values: dict[str, Values] = {}
    costs: dict[str, Cost] = {}
    with ExitStack() as stack:
        loaded: list[LoadedModel] = []

        def open_reference() -> LoadedModel:
            if not loaded:
                loaded.append(stack.enter_context(open_model(reference, context.options)))
            return loaded[0]

        for model in models[1:]:
            both, of_reference, of_model = score_with_reference(context, reference, model, open_reference)
            values[model.name], costs[model.name] = both, of_model
            values.setdefault(reference.name, {"nll": both["nll_reference"]})
            costs.setdefault(reference.name, of_reference)
    return values, costs


def _report(
    context: EvalContext,
    models: tuple[EvalModel, ...],
    values: dict[str, Values],
    costs: dict[str, Cost],
    extras: dict[str, tuple[list[TaskScore], list[dict[str, Any]]]],
    saved: Saved | None,
) -> Evaluation:
    options, task = context.options, context.task.result()
    sums = {name: task.units.sums(v["nll"]) for name, v in values.items()}
    records: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    base = sums[models[0].name] if models[0].reference else None
    if saved is not None:
        records.append(saved.record)
        base = saved.sums
    for model in models:
        name = model.name
        losses = measure(sums[name], task.units, task.protocol)
        delta = None
        if base is not None and not model.reference:
            delta = difference(sums[name], base, task.units, task.protocol)
        record = make_record(model, task.protocol, costs[name], losses, delta)
        record["unit_losses"] = sums[name].tolist()
        if "kl" in values[name]:
            record |= divergence_record(values[name], task.units)
            record["worst_documents"] = worst_documents(
                values[name], task.stream, task.tokenizer, options.worst
            )
        scores, speeds = extras[name]
        if options.tasks:
            other = extras[models[0].name][0] if models[0].reference and delta is not None else None
            record["tasks"] = task_records(scores, other)
        if options.speed:
            record["speed"] = speeds
        records.append(record)
        for gate in options.gates:
            if model.given and (delta is not None or not gate.compares):
                verdicts.append(judge(gate, name, record, delta))
    return Evaluation(
        protocol=asdict(task.protocol),
        records=tuple(records),
        verdicts=tuple(verdicts),
        description=describe(task.protocol),
        note=f"± one standard error, by bootstrap over {task.protocol.resampled}",
        first=context.ranks.first,
        task=task,
        values=values,
    )

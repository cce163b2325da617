"""Score a model, or a model together with its reference: from the cache, or computed in one pass over the text."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from loadstone.evaluation.fast.replace import speed_up
from loadstone.evaluation.harness.tasks import TaskScore, run_tasks
from loadstone.evaluation.loaded import LoadedModel, open_model
from loadstone.evaluation.measure import peak_bytes
from loadstone.evaluation.models import EvalModel
from loadstone.evaluation.options import Options
from loadstone.evaluation.ranks import merge, merge_timing
from loadstone.evaluation.record import Cost
from loadstone.evaluation.results.store import Store, entry_key, merge_partials
from loadstone.evaluation.scoring.batching import choose_batch_size
from loadstone.evaluation.scoring.divergence import score_pair
from loadstone.evaluation.scoring.lengths import batch_regime
from loadstone.evaluation.scoring.losses import BatchMaker, Timing, Values, check_finite, plan_batches, score
from loadstone.evaluation.scoring.shared_text import score_shared
from loadstone.evaluation.scoring.speed import PROMPT_TOKENS, measure_speed
from loadstone.evaluation.task import Task
from loadstone.loading.few_rows import speed_up_decoding
from loadstone.loading.positions import length_regime
from loadstone.progress import Progress
from loadstone.ranks import Ranks

log = logging.getLogger(__name__)
# ``progress(label, total)`` opens a progress bar; the function it yields is called with the number of tokens done.


@dataclass(frozen=True)
class EvalContext:
    """What all passes of a run share. ``task`` is ready some time after the first model starts to load;
    ``fingerprints``: content hashes of models by name, each computed once."""

    options: Options
    task: Future[Task]
    store: Store | None
    ranks: Ranks
    progress: Progress
    fingerprints: dict[str, str] = field(default_factory=dict)


def score_alone(context: EvalContext, model: EvalModel) -> tuple[Values, Cost]:
    """Score one model: ``nll``, float32 (tokens,)."""
    key = _key(context, model)
    if (found := _cached(context, key, model.name)) is not None:
        return found[0], found[1]["model"]
    with open_model(model, context.options) as loaded:
        maker, batches, size = _plan_batches(context, loaded)

        def compute(**options: Any) -> tuple[Values, Timing]:
            plain = context.options.compile or length_regime(loaded.model.config) is not None
            if context.options.fast and not plain:
                task = context.task.result()
                return score_shared(
                    loaded.model, maker, batches, size, task.stream, task.protocol, name=model.name, **options
                )
            return score(loaded.model, maker, batches, name=model.name, **options)

        values, timing = _run(context, key, model.name, maker, compute)
        cost = _cost(context, loaded, timing, size)
    _store(context, key, values, {"model": cost})
    return values, cost


def score_with_reference(
    context: EvalContext,
    reference: EvalModel,
    model: EvalModel,
    open_reference: Callable[[], LoadedModel],
) -> tuple[Values, Cost, Cost]:
    """Score a model and the reference together: their losses and divergence (see `score_pair`), and the costs of the
    reference and of the model. ``open_reference`` loads the reference on its first call, so that a run whose pairs are
    all in the cache loads nothing."""
    key = _key(context, reference, model)
    if (found := _cached(context, key, model.name)) is not None:
        return found[0], found[1]["reference"], found[1]["model"]
    base = open_reference()
    with open_model(model, context.options) as loaded:
        maker, batches, size = _plan_batches(context, base, loaded)
        names = (reference.name, model.name)
        both: list[tuple[Timing, Timing]] = []

        def compute(**options: Any) -> tuple[Values, Timing]:
            values, timing = score_pair(base.model, loaded.model, maker, batches, names=names, **options)
            both.append((timing.reference, timing.model))
            return values, timing.model

        values, _ = _run(context, key, model.name, maker, compute)
        costs = [_cost(context, m, t, size) for m, t in zip((base, loaded), both[0], strict=True)]
    _store(context, key, values, {"reference": costs[0], "model": costs[1]})
    return values, costs[0], costs[1]


def _run(
    context: EvalContext,
    key: str | None,
    name: str,
    maker: BatchMaker,
    compute: Callable[..., tuple[Values, Timing]],
) -> tuple[Values, Timing]:
    """Continue from stored partial scores, save regularly, and merge the ranks' parts."""
    store, ranks = context.store, context.ranks
    known, save = None, None
    if store is not None and key is not None:
        if not ranks.member:
            save = lambda values: store.save_partial(key, ranks.rank, values)  # noqa: E731
        if context.options.resume:
            # All ranks must divide the same remainder, even if their disks differ.
            known = merge_partials(ranks.gather(store.partial(key)))
    # Nobody starts writing before everybody has read.
    ranks.wait()
    with context.progress(name if ranks.first else "", maker.tokens) as step:
        try:
            values, timing = compute(
                values=known,
                share=(ranks.rank, ranks.size),
                progress=step,
                save=save,
                save_every=context.options.save_every,
            )
        except BaseException:
            if store is not None:
                log.info("finished scores are in %s: continue with --resume", store.directory)
            raise
    values = merge(ranks, values, known)
    for losses in ("nll_reference", "nll"):
        if losses in values:
            check_finite(values[losses], name)
    return values, timing


def _plan_batches(context: EvalContext, *models: LoadedModel) -> tuple[BatchMaker, Any, int]:
    task, options = context.task.result(), context.options
    for loaded in models:
        loaded.vocabulary.require(task.stream.highest, task.tokenizer, loaded.name)
    maker = BatchMaker(task.stream, task.protocol, task.windows, models[0].device)
    length = task.protocol.context_length
    size = options.batch_size or choose_batch_size(
        models[0].model, maker, length, len(models), measure=not options.stream
    )
    # Free memory may differ between the GPUs; the batches must not.
    size = min(context.ranks.gather(size))
    if options.stream:
        for loaded in models:
            loaded.model.plan_round(size * length, len(models))
    regime = batch_regime([length_regime(loaded.model.config) for loaded in models], task.protocol)
    if options.compile and not options.stream:
        maker.rows, maker.widens = size, regime is None
    return maker, plan_batches(task.windows, size, regime), size


def _cost(context: EvalContext, loaded: LoadedModel, timing: Timing, size: int) -> Cost:
    whole = merge_timing(context.ranks, timing)
    # A streamed model counts its Linear layers as they are read.
    fast = loaded.model.fast if context.options.stream else loaded.fast
    return Cost(
        seconds=whole.seconds,
        timed_tokens=whole.tokens,
        load_seconds=loaded.load_seconds,
        peak_bytes=peak_bytes(loaded.device),
        device=str(loaded.device),
        batch_size=size,
        parameters=loaded.parameters,
        dequantized_linears=fast.dequantized,
        repacked_linears=fast.repacked,
    )


def _key(context: EvalContext, *models: EvalModel) -> str | None:
    if context.store is None:
        return None
    options = context.options
    mode: dict[str, Any] = {
        "compile": options.compile,
        "fast": options.fast,
        "device": _hardware(options.device),
    }
    for model in models:
        if model.name not in context.fingerprints:
            context.fingerprints[model.name] = model.fingerprint()
    if context.ranks.members > 1:
        # Parts of a sum are added in another order.
        mode["tensor"] = context.ranks.members
    if any(model.inputs for model in models):
        mode["inputs"] = [model.inputs for model in models]
    prints = [context.fingerprints[m.name] for m in models]
    return entry_key(context.task.result().protocol, prints, mode)


def _hardware(device: str) -> str:
    """The GPU's name, or the CPU's instruction set: other hardware rounds differently."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _cached(context: EvalContext, key: str | None, name: str) -> tuple[Values, dict[str, Cost]] | None:
    if context.store is None or key is None:
        return None
    found = context.store.finished(key)
    # All ranks or none: on disks of their own, or a moment earlier, others may not find it.
    if not all(context.ranks.gather(found is not None)) or found is None:
        return None
    log.info("%s: using scores from the cache", name)
    return found[0], {role: Cost(**{**cost, "cached": True}) for role, cost in found[1].items()}


def _store(context: EvalContext, key: str | None, values: Values, costs: dict[str, Cost]) -> None:
    if context.store is not None and key is not None and context.ranks.first:
        context.store.finish(key, values, {role: asdict(cost) for role, cost in costs.items()})


def run_extras(
    context: EvalContext, model: EvalModel, batch_size: int
) -> tuple[list[TaskScore], list[dict[str, Any]]]:
    """Scores of lm-eval tasks (``--tasks``) and records of speed (``--speed``), empty where not asked for.

    All ranks divide the tasks. Rank 0 alone measures speed, on one device while the others wait, and of the model as
    anyone loads it: without the fast path and without compiled layers. On a CPU it is `load(…, fast=True)`; on a GPU
    that follows, with `greedy_decoding`.
    """
    options, task = context.options, context.task.result()
    scores: list[TaskScore] = []
    speeds: list[dict[str, Any]] = []
    plain = replace(options, stream=False, fast=False, compile=False)
    if options.speed:
        with open_model(model, plain) as loaded:
            if context.ranks.rank == 0:
                ids = task.stream.ids_at(np.arange(min(task.stream.size, PROMPT_TOKENS)))
                prompt = torch.from_numpy(ids).to(loaded.device)
                if options.fast and loaded.device.type == "cpu":
                    speed_up_decoding(loaded.model)
                speeds = measure_speed(loaded.model, prompt, (1, batch_size))
                if options.fast and loaded.device.type == "cuda" and loaded.model._can_compile_fullgraph:
                    speed_up_decoding(loaded.model)
                    speeds += measure_speed(loaded.model, prompt, (1, batch_size), compiled=True)
            context.ranks.wait()
    if options.tasks:
        # Loaded again, since kernels for few rows round otherwise.
        with open_model(model, plain) as loaded:
            log.info("%s: running lm-eval tasks", model.name)
            if options.fast and not model.has_quantizers and model.mesh is None:
                speed_up(loaded.model)
            # Requests of other lengths would change each other's frequencies.
            alone = length_regime(loaded.model.config) is not None
            scores = run_tasks(
                loaded.model,
                task.tokenizer,
                options.tasks,
                include=options.task_path,
                limit=options.limit,
                batch_size=1 if alone else batch_size,
                ranks=context.ranks,
                share=options.fast and not alone,
                vocabulary=loaded.vocabulary,
                separator_id=task.stream.separator_id,
            )
    return scores, speeds

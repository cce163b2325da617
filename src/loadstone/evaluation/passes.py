"""One pass over the text with one model, or with a model and its reference: scores out of the store or
computed."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from loadstone.evaluation.fast.replace import speed_up
from loadstone.evaluation.harness.tasks import TaskScore, run_tasks
from loadstone.evaluation.measure import peak_bytes
from loadstone.evaluation.models import Opened, Subject, has_quantizers, opened
from loadstone.evaluation.options import Options
from loadstone.evaluation.ranks import Ranks
from loadstone.evaluation.results.store import Store, entry_key, merge_partials
from loadstone.evaluation.scoring.batching import choose_batch_size
from loadstone.evaluation.scoring.divergence import score_pair
from loadstone.evaluation.scoring.losses import BatchMaker, Timing, Values, check_finite, plan_batches, score
from loadstone.evaluation.scoring.shared_text import score_shared
from loadstone.evaluation.scoring.speed import measure_speed
from loadstone.evaluation.task import Task

log = logging.getLogger(__name__)
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Cost:
    """What it took to score a model. ``cached``: the figures are those of the run that computed the
    scores."""

    seconds: float
    timed_tokens: int
    load_seconds: float
    peak_bytes: int
    device: str
    batch_size: int
    parameters: int
    kept_linears: int = 0
    packed_linears: int = 0
    cached: bool = False


@dataclass(frozen=True)
class Bench:
    """What all passes of a run share. ``task`` is ready some time after the first model starts to load;
    ``prints`` are the content hashes of models by name, each read once."""

    options: Options
    task: Future[Task]
    store: Store | None
    ranks: Ranks
    bar: Bar
    prints: dict[str, str] = field(default_factory=dict)


def single(bench: Bench, subject: Subject) -> tuple[Values, Cost]:
    """Score one model: ``nll``."""
    key = _key(bench, subject)
    if (found := _cached(bench, key, subject.name)) is not None:
        return found[0], found[1]["model"]
    with opened(subject, bench.options) as it:
        maker, batches, size = _prepare(bench, it)

        def compute(**kw: Any) -> tuple[Values, Timing]:
            if bench.options.fast and not bench.options.compile:
                task = bench.task.result()
                return score_shared(
                    it.model, maker, batches, size, task.stream, task.protocol, name=subject.name, **kw
                )
            return score(it.model, maker, batches, name=subject.name, **kw)

        values, timing = _run(bench, key, subject.name, maker, compute)
        cost = _cost(bench, it, timing, size)
    _keep(bench, key, values, {"model": cost})
    return values, cost


def pair(
    bench: Bench, reference: Subject, subject: Subject, open_reference: Callable[[], Opened]
) -> tuple[Values, Cost, Cost]:
    """Score a model and the reference together: their losses and divergence. ``open_reference`` loads the
    reference on first use, so that a run whose pairs are all in the store loads nothing."""
    key = _key(bench, reference, subject)
    if (found := _cached(bench, key, subject.name)) is not None:
        return found[0], found[1]["reference"], found[1]["model"]
    base = open_reference()
    with opened(subject, bench.options) as it:
        maker, batches, size = _prepare(bench, base, it)
        names = (reference.name, subject.name)
        both: list[tuple[Timing, Timing]] = []

        def compute(**kw: Any) -> tuple[Values, Timing]:
            values, pair_timing = score_pair(base.model, it.model, maker, batches, names=names, **kw)
            both.append((pair_timing.reference, pair_timing.model))
            return values, pair_timing.model

        values, _ = _run(bench, key, subject.name, maker, compute)
        costs = [_cost(bench, o, t, size) for o, t in zip((base, it), both[0], strict=True)]
    _keep(bench, key, values, {"reference": costs[0], "model": costs[1]})
    return values, costs[0], costs[1]


def _run(
    bench: Bench, key: str | None, name: str, maker: BatchMaker, compute: Callable[..., tuple[Values, Timing]]
) -> tuple[Values, Timing]:
    """Go on from what is stored, save as it goes, and put the processes' parts together."""
    store, ranks = bench.store, bench.ranks
    known, save = None, None
    if store is not None and key is not None:
        save = lambda values: store.save_partial(key, ranks.rank, values)  # noqa: E731
        if bench.options.resume:
            # All must divide the same rest, though each may have a disk of its own.
            known = merge_partials(ranks.gather(store.partial(key)))
    # Nobody starts writing before everybody has read.
    ranks.wait()
    with bench.bar(name if ranks.first else "", maker.tokens) as step:
        try:
            values, timing = compute(
                values=known,
                share=(ranks.rank, ranks.count),
                progress=step,
                save=save,
                save_every=bench.options.save_every,
            )
        except BaseException:
            if store is not None:
                log.info("what was scored is kept in %s: --resume goes on from there", store.directory)
            raise
    values = ranks.merge(values, known)
    for losses in ("nll_reference", "nll"):
        if losses in values:
            check_finite(values[losses], name)
    return values, timing


def _prepare(bench: Bench, *models: Opened) -> tuple[BatchMaker, Any, int]:
    task, options = bench.task.result(), bench.options
    maker = BatchMaker(task.stream, task.protocol, task.windows, models[0].device)
    context = task.protocol.context_length
    size = options.batch_size or choose_batch_size(
        models[0].model, maker, context, len(models), measure=not options.stream
    )
    # Free memory may differ between the GPUs; the batches must not.
    size = min(bench.ranks.gather(size))
    if options.stream:
        for it in models:
            it.model.plan_round(size * context, len(models))
    elif options.compile:
        maker.rows = size
    return maker, plan_batches(task.windows, size), size


def _cost(bench: Bench, it: Opened, timing: Timing, size: int) -> Cost:
    whole = bench.ranks.merge_timing(timing)
    # Of a streamed model it is known after its layers have come.
    fast = it.model.fast if bench.options.stream else it.fast
    return Cost(
        seconds=whole.seconds,
        timed_tokens=whole.tokens,
        load_seconds=it.load_seconds,
        peak_bytes=peak_bytes(it.device),
        device=str(it.device),
        batch_size=size,
        parameters=it.parameters,
        kept_linears=fast.kept,
        packed_linears=fast.packed,
    )


def _key(bench: Bench, *subjects: Subject) -> str | None:
    if bench.store is None:
        return None
    options = bench.options
    mode = {"compile": options.compile, "fast": options.fast, "device": _hardware(options.device)}
    for subject in subjects:
        if subject.name not in bench.prints:
            bench.prints[subject.name] = fingerprint(subject)
    prints = [bench.prints[s.name] for s in subjects]
    return entry_key(bench.task.result().protocol, prints, mode)


def _hardware(device: str) -> str:
    """What computes: a GPU's name, or the CPU's instruction set. Other hardware rounds differently."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def fingerprint(subject: Subject) -> str:
    """Content hash of a subject's weights, and of the prefix before them."""
    log.debug("hashing %s", subject.name)
    base = subject.plan.artifact.fingerprint()
    return base if subject.prefix is None else f"{base} {subject.prefix.facts['digest']}"


def _cached(bench: Bench, key: str | None, name: str) -> tuple[Values, dict[str, Cost]] | None:
    if bench.store is None or key is None:
        return None
    found = bench.store.finished(key)
    # All processes or none: what one finds the others may not, on disks of their own or a moment earlier.
    if not all(bench.ranks.gather(found is not None)) or found is None:
        return None
    log.info("%s: scores found in the cache", name)
    return found[0], {role: Cost(**{**cost, "cached": True}) for role, cost in found[1].items()}


def _keep(bench: Bench, key: str | None, values: Values, costs: dict[str, Cost]) -> None:
    if bench.store is not None and key is not None and bench.ranks.first:
        bench.store.finish(key, values, {role: asdict(cost) for role, cost in costs.items()})


def extras(bench: Bench, subject: Subject, batch_size: int) -> tuple[list[TaskScore], list[dict[str, Any]]]:
    """What was asked for besides the text: scores of lm-eval tasks, and figures of speed.

    All processes divide the tasks. Speed is one process's on one device, while the others wait, and that of the
    model as anyone loads it: without the fast path and without compiled layers.
    """
    options, task = bench.options, bench.task.result()
    if not options.tasks and not options.speed:
        return [], []
    scores: list[TaskScore] = []
    speeds: list[dict[str, Any]] = []
    with opened(subject, replace(options, stream=False, fast=False, compile=False)) as it:
        if options.speed:
            if bench.ranks.first:
                ids = torch.from_numpy(task.stream.ids).to(it.device)
                speeds = measure_speed(it.model, ids, (1, batch_size))
            bench.ranks.wait()
        if options.tasks:
            log.info("%s: running lm-eval tasks", subject.name)
            if options.fast and not has_quantizers(subject):
                speed_up(it.model)
            scores = run_tasks(
                it.model,
                task.tokenizer,
                options.tasks,
                include=options.task_path,
                limit=options.limit,
                batch_size=batch_size,
                ranks=bench.ranks,
                share=options.fast,
            )
    return scores, speeds

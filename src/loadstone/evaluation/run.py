"""One evaluation from options to records: plan, tokenize, score each model, compare, hold against the
gates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loadstone.errors import UsageError
from loadstone.evaluation.harness.tasks import TaskScore, task_manager, task_records
from loadstone.evaluation.models import Subject, choose_streaming, choose_subjects, opened
from loadstone.evaluation.options import DEFAULT_CACHE, Options
from loadstone.evaluation.passes import Bar, Bench, Cost, extras, pair, single
from loadstone.evaluation.ranks import joined
from loadstone.evaluation.results.compare import difference, require_same, summarize
from loadstone.evaluation.results.gates import Verdict, judge
from loadstone.evaluation.results.record import make_record
from loadstone.evaluation.results.saved import Saved, read_saved
from loadstone.evaluation.results.store import open_store
from loadstone.evaluation.scoring.divergence import divergence_record, worst_documents
from loadstone.evaluation.scoring.losses import Values
from loadstone.evaluation.task import Task, make_task

log = logging.getLogger(__name__)
_PATIENCE = 5.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a run. ``records`` are the JSON schema's ``models``, reference first; ``values`` each
    model's per-token values by path. ``first``: whether this process is the one that reports."""

    task: Task
    records: tuple[dict[str, Any], ...]
    verdicts: tuple[Verdict, ...]
    values: dict[str, Values]
    first: bool

    @property
    def failures(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.failed)

    def as_json(self) -> dict[str, Any]:
        """The documented schema (docs/eval.md)."""
        return {
            "protocol": asdict(self.task.protocol),
            "models": list(self.records),
            "gates": [asdict(v) for v in self.verdicts],
        }


def no_bar(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar that shows nothing."""
    return nullcontext(lambda step: None)


def evaluate(options: Options, bar: Bar = no_bar) -> Outcome:
    """Run an evaluation. ``bar(label, total)`` gives a context in which progress is reported, in tokens.

    Raises UsageError for options that do not fit together, ArtifactError for a model that cannot be trusted.
    """
    if not options.compares:
        for gate in options.gates:
            if gate.compares:
                raise UsageError(
                    f"--fail-if '{gate.text}' needs a baseline", "Add --baseline DIR or a second -M"
                )
        if options.divergence:
            raise UsageError("--kl needs a reference model", "Add --baseline DIR or a second -M")
    if options.tasks:
        # What is wrong with them is said now, not after the text was scored.
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
    store = open_store(options.cache or DEFAULT_CACHE) if options.cache or options.resume else None
    with joined() as ranks, ThreadPoolExecutor(1) as pool:
        subjects = choose_subjects(options, ranks.device(options.device), referenced=saved is not None)
        streams = choose_streaming(subjects, options)
        if streams and options.compile:
            log.warning("--compile has no effect on models that are streamed layer by layer")
        options = replace(options, stream=streams, compile=options.compile and not streams)
        # The text is read and tokenized while the first model loads.
        making = pool.submit(make_task, options, subjects)
        bench = Bench(options, making, store, ranks, bar)
        # A wrong option shows within seconds; only a long text is still being tokenized after that.
        if wait([making], timeout=_PATIENCE).done:
            making.result()
        if saved is not None:
            # Before anything is computed.
            require_same(making.result().protocol, saved.protocol, (subjects[0].name, saved.record["path"]))
        measure = _with_divergence if options.measures_divergence else _alone
        values, costs = measure(bench, subjects)
        more = {s.name: extras(bench, s, costs[s.name].batch_size) for s in subjects}
        # The launcher would take an early end for a failure.
        ranks.wait()
        return _report(bench, subjects, values, costs, more, saved)


def _alone(bench: Bench, subjects: tuple[Subject, ...]) -> tuple[dict[str, Values], dict[str, Cost]]:
    """One model in memory at a time."""
    values, costs = {}, {}
    for subject in subjects:
        values[subject.name], costs[subject.name] = single(bench, subject)
    return values, costs


def _with_divergence(
    bench: Bench, subjects: tuple[Subject, ...]
) -> tuple[dict[str, Values], dict[str, Cost]]:
    """The reference stays in memory while the others take turns beside it."""
    reference = subjects[0]
    values: dict[str, Values] = {}
    costs: dict[str, Cost] = {}
    with ExitStack() as stack:
        kept: list[Any] = []

        def open_reference() -> Any:
            if not kept:
                kept.append(stack.enter_context(opened(reference, bench.options)))
            return kept[0]

        for subject in subjects[1:]:
            both, of_reference, of_subject = pair(bench, reference, subject, open_reference)
            values[subject.name], costs[subject.name] = both, of_subject
            values.setdefault(reference.name, {"nll": both["nll_reference"]})
            costs.setdefault(reference.name, of_reference)
    return values, costs


def _report(
    bench: Bench,
    subjects: tuple[Subject, ...],
    values: dict[str, Values],
    costs: dict[str, Cost],
    more: dict[str, tuple[list[TaskScore], list[dict[str, Any]]]],
    saved: Saved | None,
) -> Outcome:
    options, task = bench.options, bench.task.result()
    sums = {name: task.units.sums(v["nll"]) for name, v in values.items()}
    records: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    base = sums[subjects[0].name] if subjects[0].reference else None
    if saved is not None:
        records.append(saved.record)
        base = saved.sums
    for subject in subjects:
        name = subject.name
        figures = summarize(sums[name], task.units, task.protocol)
        delta = None
        if base is not None and not subject.reference:
            delta = difference(sums[name], base, task.units, task.protocol)
        record = make_record(subject, task.protocol, costs[name], figures, delta)
        record["unit_losses"] = sums[name].tolist()
        if "kl" in values[name]:
            record |= divergence_record(values[name], task.units)
            record["worst_documents"] = worst_documents(
                values[name], task.stream, task.tokenizer, options.worst
            )
        scores, speeds = more.get(name, ([], []))
        if options.tasks:
            other = (
                more[subjects[0].name][0] if more and subjects[0].reference and delta is not None else None
            )
            record["tasks"] = task_records(scores, other)
        if options.speed:
            record["speed"] = speeds
        records.append(record)
        for gate in options.gates:
            if subject.given and (delta is not None or not gate.compares):
                verdicts.append(judge(gate, record, delta))
    return Outcome(task, tuple(records), tuple(verdicts), values, bench.ranks.first)

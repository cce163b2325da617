"""One evaluation from options to records: plan, tokenize, score each model, compare, hold against the
gates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from loadstone.errors import UsageError
from loadstone.evaluation.compare import Delta, Figures, Units, difference, make_units, summarize
from loadstone.evaluation.gates import Gate, Verdict, judge
from loadstone.evaluation.measure import peak_bytes
from loadstone.evaluation.models import Subject, choose_subjects, context_limit, opened
from loadstone.evaluation.scoring import BatchMaker, default_batch_size, plan_batches, score
from loadstone.evaluation.text import SAMPLE, read_corpus
from loadstone.evaluation.tokens import (
    PACKED,
    Protocol,
    TokenStream,
    Windows,
    make_protocol,
    make_windows,
    tokenize,
    tokenizer_hash,
)
from loadstone.loading import load_tokenizer

log = logging.getLogger(__name__)
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Options:
    """What to evaluate and how; fields are the command's options."""

    models: tuple[str, ...]
    baseline: str | None = None
    data: str = SAMPLE
    text_column: str | None = None
    split: str | None = None
    limit: int | None = None
    protocol: str = PACKED
    context_length: int | None = None
    stride: int | None = None
    separator: str = "auto"
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    checkpoint: str | None = None
    no_checkpoint: bool = False
    trust_remote_code: bool = False
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True, eq=False)
class Task:
    """What every model of the run is asked: the same tokens in the same windows."""

    stream: TokenStream
    protocol: Protocol
    windows: Windows
    units: Units


@dataclass(frozen=True, eq=False)
class Measured:
    """One model's losses, float32 (tokens,), and what it took to get them."""

    nll: np.ndarray
    seconds: float
    timed_tokens: int
    load_seconds: float
    peak_bytes: int
    device: str


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a run. ``records`` are the JSON schema's ``models``, reference first."""

    protocol: Protocol
    records: tuple[dict[str, Any], ...]
    verdicts: tuple[Verdict, ...]
    task: Task
    measured: dict[str, Measured] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.failed)

    def as_json(self) -> dict[str, Any]:
        """The documented schema (docs/eval.md)."""
        return {
            "protocol": asdict(self.protocol),
            "models": list(self.records),
            "gates": [asdict(v) for v in self.verdicts],
        }


def no_bar(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda step: None)


def evaluate(options: Options, bar: Bar = no_bar) -> Outcome:
    """Run an evaluation. ``bar(label, total)`` gives a context in which progress is reported, in tokens.

    Raises UsageError for options that do not fit together, ArtifactError for a model that cannot be trusted.
    """
    if options.baseline is None and len(set(options.models)) < 2:
        for gate in options.gates:
            if gate.compares:
                raise UsageError(
                    f"--fail-if '{gate.text}' compares with a baseline", "Add --baseline DIR or a second -M"
                )
    subjects = choose_subjects(
        options.models,
        options.baseline,
        device=options.device,
        dtype=options.dtype,
        checkpoint=options.checkpoint,
        no_checkpoint=options.no_checkpoint,
        trust_remote_code=options.trust_remote_code,
    )
    measured: dict[str, Measured] = {}
    # The text is read and tokenized while the first model loads.
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(make_task, options, subjects)
        for subject in subjects:
            measured[subject.name] = _measure(subject, options, making.result, bar)
    task = making.result()
    sums = {name: task.units.sums(m.nll) for name, m in measured.items()}
    reference = next((s for s in subjects if s.reference), None)
    records, verdicts = [], []
    for subject in subjects:
        figures = summarize(sums[subject.name], task.units, task.protocol)
        delta = None
        if reference is not None and subject is not reference:
            delta = difference(sums[subject.name], sums[reference.name], task.units, task.protocol)
        record = make_record(subject, task, measured[subject.name], figures, delta)
        records.append(record)
        for gate in options.gates:
            if subject.given and (delta is not None or not gate.compares):
                verdicts.append(judge(gate, record, delta))
    return Outcome(task.protocol, tuple(records), tuple(verdicts), task, measured)


def make_task(options: Options, subjects: tuple[Subject, ...]) -> Task:
    """Tokens, protocol and windows, from the reference's tokenizer; every other model must tokenize alike."""
    corpus = read_corpus(options.data, column=options.text_column, split=options.split, limit=options.limit)
    first = subjects[0]
    stream = tokenize(
        corpus,
        load_tokenizer(first.plan, trust_remote_code=options.trust_remote_code),
        separator=options.separator,
    )
    for other in subjects[1:]:
        tokenizer = load_tokenizer(other.plan, trust_remote_code=options.trust_remote_code)
        if tokenizer_hash(tokenizer) == stream.tokenizer_sha256:
            continue
        if tokenize(corpus, tokenizer, separator=options.separator).sha256 != stream.sha256:
            raise UsageError(
                f"'{first.name}' and '{other.name}' tokenize the text differently: no comparison",
                "Evaluate them one at a time and compare bits_per_byte",
            )
    limits = [limit for s in subjects if (limit := context_limit(s.plan.artifact.config)) is not None]
    protocol = make_protocol(
        stream,
        dtype=first.plan.dtype,
        longest=min(limits, default=None),
        name=options.protocol,
        context_length=options.context_length,
        stride=options.stride,
    )
    return Task(stream, protocol, make_windows(stream, protocol), make_units(stream, protocol))


def _measure(subject: Subject, options: Options, task_when_ready: Callable[[], Task], bar: Bar) -> Measured:
    with opened(subject) as it:
        task = task_when_ready()
        batch_size = options.batch_size or default_batch_size(task.protocol.context_length, it.device)
        maker = BatchMaker(task.stream, task.protocol, task.windows, it.device)
        batches = plan_batches(task.windows, batch_size)
        with bar(subject.name, maker.tokens) as step:
            scores = score(it.model, maker, batches, name=subject.name, progress=step)
        return Measured(
            nll=scores.nll,
            seconds=scores.seconds,
            timed_tokens=scores.timed_tokens,
            load_seconds=it.load_seconds,
            peak_bytes=peak_bytes(it.device),
            device=str(it.device),
        )


def make_record(
    subject: Subject, task: Task, measured: Measured, figures: Figures, delta: Delta | None
) -> dict[str, Any]:
    """A model's entry in the JSON: names are frozen once released, absent figures are null."""
    record: dict[str, Any] = {
        "path": subject.name,
        "kind": subject.plan.artifact.kind,
        "load_path": subject.plan.load_path,
        "reference": subject.reference,
        "loss": figures.loss.value,
        "loss_stderr": _number(figures.loss.stderr),
        "loss_interval95": [_number(figures.loss.lower), _number(figures.loss.upper)],
        "perplexity": figures.perplexity,
        "perplexity_stderr": _number(figures.perplexity_stderr),
        "bits_per_byte": figures.bits_per_byte.value,
        "bits_per_byte_stderr": _number(figures.bits_per_byte.stderr),
        "word_perplexity": figures.word_perplexity,
        "byte_perplexity": figures.byte_perplexity,
        "tokens": task.protocol.tokens,
        "documents": task.protocol.documents,
        "delta_loss": None,
        "delta_loss_stderr": None,
        "delta_loss_interval95": None,
        "delta_perplexity": None,
        "delta_perplexity_relative": None,
        "delta_bits_per_byte": None,
        "tokens_per_second": measured.timed_tokens / measured.seconds if measured.seconds else None,
        "load_seconds": measured.load_seconds,
        "peak_memory_bytes": measured.peak_bytes,
        "device": measured.device,
        "dtype": subject.plan.dtype,
    }
    if delta is not None:
        record |= {
            "delta_loss": delta.loss.value,
            "delta_loss_stderr": _number(delta.loss.stderr),
            "delta_loss_interval95": [_number(delta.loss.lower), _number(delta.loss.upper)],
            "delta_perplexity": delta.perplexity,
            "delta_perplexity_relative": delta.relative_perplexity,
            "delta_bits_per_byte": delta.bits_per_byte,
        }
    return record


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None

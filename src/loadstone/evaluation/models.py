"""The models of one evaluation: planned once each, opened one at a time, all computing in one dtype."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loadstone.artifact import Artifact
from loadstone.artifact.context_file import PREFIX, ContextFile, is_context, read_context, require_kind
from loadstone.artifact.detect import FAKEQUANT, PFN
from loadstone.errors import UsageError
from loadstone.evaluation.fast.replace import FastPath, speed_up
from loadstone.evaluation.measure import reset_peak
from loadstone.evaluation.options import Options
from loadstone.evaluation.scoring.compiling import compile_layers
from loadstone.evaluation.scoring.head import Prefixed
from loadstone.evaluation.scoring.streaming import StreamedLm, can_stream, must_stream
from loadstone.loading import LoadPlan, load, plan
from loadstone.loading.devices import resolve_device
from loadstone.loading.streamed import streamed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated, as named by the user, and how it will be loaded. ``given``: named with
    ``-M``, as opposed to being there as the baseline only. ``prefix``: the language-model prefix that was named; the
    plan is its base's."""

    name: str
    plan: LoadPlan
    reference: bool
    given: bool
    prefix: ContextFile | None = None


@dataclass(frozen=True, eq=False)
class Opened:
    """A loaded model. ``device`` is where its inputs go; ``fast_modules`` how many Linears keep
    dequantized weights."""

    model: Any
    device: torch.device
    load_seconds: float
    parameters: int
    fast: FastPath


def choose_subjects(options: Options, device: str, *, referenced: bool = False) -> tuple[Subject, ...]:
    """Plan every model, the reference (the baseline, or the first of several) first, in one common dtype.

    ``referenced``: the reference is a saved result, so none of these is.
    """
    if not options.models:
        raise UsageError("no model to evaluate", "Name a directory with -M")
    names = list(dict.fromkeys([options.baseline or options.models[0], *options.models]))
    if options.baseline is not None and len(names) == 1:
        raise UsageError(f"the baseline '{options.baseline}' is the only model", "Name another with -M")
    prefixes = choose_prefixes(names, options)
    if prefixes[0] is not None:
        options = replace(options, dtype=prefixes[0].facts["numerics"]["dtype"])
    plans = [
        plan(
            name if prefix is None else find_prefix_base(prefix, options),
            device=device,
            dtype=options.dtype,
            checkpoint=options.checkpoint if name in options.models else None,
            no_checkpoint=options.no_checkpoint and name in options.models,
            trust_remote_code=options.trust_remote_code,
        )
        for name, prefix in zip(names, prefixes, strict=True)
    ]
    for name, planned in zip(names, plans, strict=True):
        if planned.artifact.kind == PFN:
            raise UsageError(
                f"'{name}' predicts tables, and eval on text needs a language model",
                "Fit it to a table first (loadstone fit --table), and evaluate the context",
            )
    if options.dtype == "auto":
        dtype, why = compute_dtype(plans[0], device)
        log.info("computing in %s: %s", dtype, why)
        plans = [replace(p, dtype=dtype) for p in plans]
    return tuple(
        Subject(
            name,
            p,
            reference=len(names) > 1 and i == 0 and not referenced,
            given=name in options.models,
            prefix=prefix,
        )
        for i, (name, p, prefix) in enumerate(zip(names, plans, prefixes, strict=True))
    )


def choose_prefixes(names: list[str], options: Options) -> list[ContextFile | None]:
    """The language-model prefix behind each name, None for a plain model.

    All or none of the models of a run come after a prefix, and all after the same one: their losses are compared token
    by token. Raises UsageError when it is otherwise, and for options that a prefix has no use for.
    """
    from loadstone.context.prefix.store import check_facts

    files: list[ContextFile | None] = []
    for name in names:
        if not is_context(Path(name)):
            files.append(None)
            continue
        require_kind(Path(name), PREFIX, by="eval on text")
        file = read_context(Path(name), verify=True)
        check_facts(file)
        files.append(file)
    found = [file for file in files if file is not None]
    if not found:
        return files
    if len(found) < len(files):
        plain = names[files.index(None)]
        raise UsageError(
            f"'{plain}' is a model and '{found[0].path}' a prefix: they see different contexts",
            "Make a prefix of the same prompt with it (loadstone fit --prompt)",
        )
    first = found[0].facts
    for other in found[1:]:
        if other.facts["prompt"]["sha256"] != first["prompt"]["sha256"]:
            raise UsageError(
                f"'{found[0].path}' and '{other.path}' are prefixes of different prompts: no comparison",
                "Make both of the same prompt, or evaluate them one at a time",
            )
        if other.facts["numerics"]["dtype"] != first["numerics"]["dtype"]:
            raise UsageError(
                f"'{found[0].path}' was made in {first['numerics']['dtype']}, '{other.path}' in "
                f"{other.facts['numerics']['dtype']}: no comparison",
                "Make both in one dtype (finalize --dtype)",
            )
    if options.dtype not in ("auto", first["numerics"]["dtype"]):
        raise UsageError(
            f"--dtype {options.dtype}: the prefix was made in {first['numerics']['dtype']}", "Leave it out"
        )
    for flag, given in (("--compile", options.compile), ("--speed", options.speed)):
        if given:
            raise UsageError(f"{flag} has no meaning after a prefix", "Leave it out")
    return files


def find_prefix_base(file: ContextFile, options: Options) -> Artifact:
    """The base of a prefix, its recipe and tokenizer checked."""
    from loadstone.context.prefix.store import check_base, find_base
    from loadstone.loading import load_tokenizer

    artifact = find_base(file, options.base)
    check_base(file, artifact, load_tokenizer(artifact, trust_remote_code=options.trust_remote_code))
    return artifact


def compute_dtype(reference: LoadPlan, device: str) -> tuple[str, str]:
    """The fastest type of the device that is exact enough, and the reason for it."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if not on_gpu:
        return (
            "float32",
            "most CPUs emulate bfloat16 products, several times slower; float32 agrees between CPUs",
        )
    config = reference.artifact.config
    config = {**config, **(config.get("text_config") or {})}
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return (
        stored if stored in ("float32", "float16") else "bfloat16"
    ), "the type the reference model is stored in"


def has_quantizers(subject: Subject) -> bool:
    """Whether a model is a fake-quant export, whose modules have quantizers hooked to them."""
    return subject.plan.artifact.kind == FAKEQUANT


def _apply_quantizers(model: Any, subject: Subject) -> int:
    """Turn on a fake-quant export's quantizers of inputs, keys and values; how many there are."""
    if not has_quantizers(subject):
        return 0
    from loadstone.fakequant.inputs import apply_export

    count = apply_export(model, subject.plan.artifact)
    log.info("%s: folded weights and %d quantizers of inputs", subject.name, count)
    return count


@contextmanager
def opened(subject: Subject, options: Options) -> Iterator[Opened]:
    """Load a model for the length of a ``with`` block; its memory is free again after it."""
    reset_peak(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    clock = time.perf_counter()
    with ExitStack() as stack:
        if options.stream:
            device = input_device(subject.plan)
            source = stack.enter_context(streamed(subject.plan, device))
            parameters = _count(source.model)
            model: Any = StreamedLm(source, fast=options.fast)
            fast = model.fast
        else:
            model = load(subject.plan)
            parameters = _count(model)
            device = model.get_input_embeddings().weight.device
            hooked = _apply_quantizers(model, subject)
            cache = None
            if subject.prefix is not None:
                from loadstone.context.prefix.store import bind_prefix

                # Before the fast path: its modules hold weights that no fingerprint knows.
                name = str(subject.plan.artifact.root)
                cache = bind_prefix(subject.prefix, model, None, name, share=options.fast)
            # The fast path would put other modules in the place of those with hooks.
            fast = speed_up(model) if options.fast and not hooked else FastPath()
            if options.compile:
                compile_layers(model)
            if cache is not None:
                model = Prefixed(model, cache)
                del cache
        it = Opened(model, device, time.perf_counter() - clock, parameters, fast)
        del model
        try:
            yield it
        finally:
            # The caller's variable still names this record: what it holds has to go, not the record.
            object.__setattr__(it, "model", None)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def input_device(plan: LoadPlan) -> torch.device:
    """The one device that streamed layers compute on. Raises as a load does when it is not there."""
    if plan.device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    place = resolve_device(plan.device, plan.artifact)
    return torch.device("cpu" if place is None else place[""])


def choose_streaming(subjects: tuple[Subject, ...], options: Options) -> bool:
    """Whether models are streamed layer by layer: as asked, else when those held at once do not fit the memory.

    Raises UsageError when it was asked for and cannot be.
    """
    if any(s.prefix is not None for s in subjects):
        if options.stream:
            raise UsageError("--stream has no meaning after a prefix", "Leave it out")
        return False
    cannot = [s.name for s in subjects if not can_stream(s.plan)]
    if options.stream and cannot:
        raise UsageError(
            f"--stream: the layers of '{cannot[0]}' cannot be read one at a time",
            "Only dense and torchao safetensors can: leave --stream out, or finalize it",
        )
    if options.stream is not None or cannot:
        return bool(options.stream)
    plans = [s.plan for s in subjects]
    several = plans[0].device == "auto" and torch.cuda.is_available()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if several else []
    devices = devices or [input_device(plans[0])]
    alone = any(must_stream([p], devices) for p in plans)
    pairs = options.measures_divergence and any(must_stream([plans[0], p], devices) for p in plans[1:])
    if alone or pairs:
        log.info(
            "%s not fit the memory here: streamed layer by layer",
            "a model does" if alone else "model and reference do",
        )
    return alone or pairs


def context_limit(config: dict[str, Any]) -> int | None:
    """The most positions a model takes, from its ``config.json`` (its text part where it has one)."""
    config = {**config, **(config.get("text_config") or {})}
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None

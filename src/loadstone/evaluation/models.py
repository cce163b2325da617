"""The models of one evaluation: planned once each, opened one at a time, all computing in one dtype."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from loadstone.errors import UsageError
from loadstone.evaluation.compiling import compile_layers
from loadstone.evaluation.fastpath import FastPath, speed_up
from loadstone.evaluation.measure import reset_peak
from loadstone.evaluation.options import Options
from loadstone.loading import LoadPlan, load, plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated, as named by the user, and how it will be loaded. ``given``: named with
    ``-M``, as opposed to being there as the baseline only."""

    name: str
    plan: LoadPlan
    reference: bool
    given: bool


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
    plans = [
        plan(
            name,
            device=device,
            dtype=options.dtype,
            checkpoint=options.checkpoint if name in options.models else None,
            no_checkpoint=options.no_checkpoint and name in options.models,
            trust_remote_code=options.trust_remote_code,
        )
        for name in names
    ]
    if options.dtype == "auto":
        dtype, why = compute_dtype(plans[0], device)
        log.info("computing in %s: %s", dtype, why)
        plans = [replace(p, dtype=dtype) for p in plans]
    return tuple(
        Subject(name, p, reference=len(names) > 1 and i == 0 and not referenced, given=name in options.models)
        for i, (name, p) in enumerate(zip(names, plans, strict=True))
    )


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


@contextmanager
def opened(subject: Subject, options: Options) -> Iterator[Opened]:
    """Load a model for the length of a ``with`` block; its memory is free again after it."""
    reset_peak(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    clock = time.perf_counter()
    model = load(subject.plan)
    device = model.get_input_embeddings().weight.device
    parameters = sum(p.numel() for p in model.parameters())
    fast = speed_up(model) if options.fast else FastPath()
    if options.compile:
        compile_layers(model)
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


def context_limit(config: dict[str, Any]) -> int | None:
    """The most positions a model takes, from its ``config.json`` (its text part where it has one)."""
    config = {**config, **(config.get("text_config") or {})}
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None

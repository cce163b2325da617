"""Load a model for evaluation: whole or streamed layer by layer, with its fast path, quantizers and prefix."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loadstone.errors import UsageError
from loadstone.evaluation.causal import Vocabulary, require_causal
from loadstone.evaluation.fast.replace import FastPath, speed_up
from loadstone.evaluation.measure import reset_peak
from loadstone.evaluation.models import EvalModel
from loadstone.evaluation.options import Options
from loadstone.evaluation.scoring.compiling import compile_layers
from loadstone.evaluation.scoring.head import PrefixedModel, logits_of
from loadstone.evaluation.scoring.lengths import forget_lengths
from loadstone.evaluation.scoring.streaming import StreamedLm, can_stream, must_stream
from loadstone.evaluation.served_inputs import input_changes, round_model_inputs
from loadstone.loading import LoadPlan, load
from loadstone.loading.placement import resolve_device
from loadstone.loading.streamed import streamed

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A loaded model. ``device``: where its inputs go; ``fast``: how many Linear layers were replaced by faster
    ones; ``vocabulary``: the tokens it takes and predicts."""

    name: str
    model: Any
    vocabulary: Vocabulary
    device: torch.device
    load_seconds: float
    parameters: int
    fast: FastPath


@contextmanager
def open_model(model: EvalModel, options: Options) -> Iterator[LoadedModel]:
    """Load a model for the length of a ``with`` block; its memory is freed at the end.

    Raises UsageError for a model that is no causal language model.
    """
    reset_peak(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    clock = time.perf_counter()
    with ExitStack() as stack:
        if options.stream:
            device = input_device(model.plan)
            source = stack.enter_context(streamed(model.plan, device))
            parameters = _count(source.model)
            forget_lengths(source.model)
            changes = input_changes(model.plan.artifact, source.model) if model.inputs else {}
            module: Any = StreamedLm(source, model.name, fast=options.fast and not changes, inputs=changes)
            fast, vocabulary = module.fast, module.vocabulary
        else:
            module = load(model.plan, mesh=model.mesh)
            parameters = _count(module)
            forget_lengths(module)
            hooked = _apply_quantizers(module, model)
            vocabulary = require_causal(module, model.name, partial(logits_of, module))
            device = module.get_input_embeddings().weight.device
            cache = None
            if model.prefix is not None:
                from loadstone.context.prefix.store import bind_prefix

                # Before the fast path: the fingerprint covers the weights as loaded, not the modules it puts there.
                name = str(model.plan.artifact.root)
                cache = bind_prefix(model.prefix, module, None, name, share=options.fast)
            # The fast path replaces modules, and the hooks of quantizers would be lost with them.
            fast = FastPath()
            if options.fast and not hooked and model.mesh is None:
                fast = speed_up(module, pack=not options.compile)
            if options.compile:
                compile_layers(module)
            if cache is not None:
                module = PrefixedModel(module, cache)
                del cache
        loaded = LoadedModel(
            model.name, module, vocabulary, device, time.perf_counter() - clock, parameters, fast
        )
        del module
        try:
            yield loaded
        finally:
            # The caller's variable still refers to this record, so the model is removed from it.
            object.__setattr__(loaded, "model", None)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _apply_quantizers(module: Any, model: EvalModel) -> int:
    """Turn on the quantizers of inputs, keys and values that a model has; returns how many there are."""
    if not model.has_quantizers:
        return 0
    if model.inputs:
        changes = input_changes(model.plan.artifact, module)
        round_model_inputs(module, changes)
        return len(changes)
    from loadstone.fakequant.inputs import apply_export

    count = apply_export(module, model.plan.artifact)
    log.info("%s: fake-quantized weights and %d input quantizers", model.name, count)
    return count


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def input_device(plan: LoadPlan) -> torch.device:
    """The one device that streamed layers compute on. Raises as a load does when the device is not available."""
    if plan.device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    place = resolve_device(plan.device, plan.artifact)
    return torch.device("cpu" if place is None else place[""])


def choose_streaming(models: Sequence[EvalModel], options: Options) -> bool:
    """Whether to stream layer by layer: as asked, otherwise when the models held at once do not fit in memory.

    Raises UsageError when streaming was asked for and is not possible.
    """
    if models[0].mesh is not None:
        return False
    if any(m.prefix is not None for m in models):
        if options.stream:
            raise UsageError("--stream has no meaning after a prefix", "Leave it out")
        return False
    cannot = [m.name for m in models if not can_stream(m.plan)]
    if options.stream and cannot:
        raise UsageError(
            f"--stream: the layers of '{cannot[0]}' cannot be read one at a time",
            "Only safetensors with a native load path can, but no fake-quantized exports: leave --stream out",
        )
    if options.stream is not None or cannot:
        return bool(options.stream)
    if fits(models, options):
        return False
    log.info(
        "%s not fit in memory: streaming layer by layer",
        "model and reference do" if options.measures_divergence else "a model does",
    )
    return True


def fits(models: Sequence[EvalModel], options: Options, share: float = 1.0) -> bool:
    """Whether the models that are held at once, or a ``share`` of each, fit in memory."""
    first = models[0].plan
    several = first.device == "auto" and torch.cuda.is_available()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if several else []
    devices = devices or [input_device(first)]
    return not any(
        must_stream([m.plan for m in together], devices, share) for together in held_together(models, options)
    )


def held_together(models: Sequence[EvalModel], options: Options) -> list[tuple[EvalModel, ...]]:
    """The models that are in memory at once: one alone, or each beside the reference."""
    if options.measures_divergence and len(models) > 1:
        return [(models[0], model) for model in models[1:]]
    return [(model,) for model in models]

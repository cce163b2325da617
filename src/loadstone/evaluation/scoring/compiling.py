"""``--compile``: one graph for all decoder layers, compiled in seconds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from loadstone.loading import LoadPlan
from loadstone.loading.layers import INDUCTOR, layer_stack
from loadstone.loading.model_class import load_config, model_class_of

log = logging.getLogger(__name__)

# Compiling takes 4 to 6 seconds of the time that an H100 or H200 takes for this many floating-point operations in
# eager mode (350 TFLOP/s), and saves 28 % of it (tests/bench/gpu_eval.py). Slower cards save more.
_FLOPS = 5 / 0.28 * 350e12


def compiling_pays(plans: Sequence[LoadPlan], tokens: int) -> bool:
    """Whether models compute ``tokens`` tokens sooner with compiled layers, warm-up included.

    Decided by sizes alone and never by a timing, since the two modes give losses that differ in the fourth digit; and
    only for classes of which transformers says that they compile.
    """
    for plan in plans:
        stored = sum(info.numel for info in plan.artifact.source.tensors.values())
        if 2 * stored * tokens < _FLOPS:
            return False
        cls = model_class_of(
            load_config(plan.artifact, plan.trust_remote_code), plan.artifact, plan.trust_remote_code
        )
        if not getattr(cls, "_can_compile_fullgraph", False):
            return False
    return True


def compile_layers(model: Any) -> int:
    """Compile each decoder layer in place. Returns how many there are.

    The layers are alike, so the graph of the first is used for all; compiling the whole model instead takes minutes
    and is no faster. Compiled kernels round differently from eager ones (they keep more in float32):
    losses move in the third or fourth digit, the same way for every model, so models are compared under one
    mode only.
    """
    layers = decoder_layers(model)
    if not layers:
        log.warning("--compile: no stack of decoder layers found; computing without it")
    for layer in layers:
        # Windows have few lengths, and symbolic shapes are slower.
        layer.compile(dynamic=False, options=INDUCTOR)
    return len(layers)


def is_compiled(model: Any) -> bool:
    """Whether `compile_layers` compiled layers of it."""
    return any(layer._compiled_call_impl is not None for layer in decoder_layers(model))


def eagerly(model: Any) -> AbstractContextManager[object]:
    """Ignore compiled layers for the length of a block: compiling a graph for a probe's shape takes seconds."""
    if not is_compiled(model):
        return nullcontext()
    import torch

    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers; empty if the model has no list of them."""
    stack = layer_stack(model)
    return [] if stack is None else list(stack.layers)

"""``--compile``: one graph for all decoder layers, compiled in seconds."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

log = logging.getLogger(__name__)


def compile_layers(model: Any) -> int:
    """Compile each decoder layer in place; how many there are.

    Layers are alike, so the first one's graph serves all: compiling the whole model instead costs minutes
    and gains nothing more. Compiled kernels round differently from eager ones (they keep more in float32):
    losses move in the third or fourth digit, the same way for every model, so models are compared under one
    mode only.
    """
    layers = decoder_layers(model)
    if not layers:
        log.warning("--compile: no stack of decoder layers found; computing without it")
    for layer in layers:
        # Windows come in few lengths; a symbolic shape would cost speed.
        layer.compile(dynamic=False)
    return len(layers)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The longest list of equal modules under the base model: its decoder layers."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    # Experts and the like are stacks too, inside a layer: the outermost comes first in `modules`.
    return list(stacks[0]) if stacks else []

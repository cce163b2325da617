"""Quantizers of layer inputs and of keys and values in a running transformers model, as hooks that can
be removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.kinds import FAKEQUANT
from loadstone.errors import ArtifactError
from loadstone.fakequant.state import INPUT, QuantizerState, read_state

if TYPE_CHECKING:
    import torch

    from loadstone.artifact import Artifact

KEYS, VALUES = "k_bmm_quantizer", "v_bmm_quantizer"
Change = Callable[["torch.Tensor"], "torch.Tensor"]


def input_modules(model: Any, quantizers: list[str]) -> dict[str, Any]:
    """The module in ``model`` whose input each ``<module>.input_quantizer`` is about; names are a
    checkpoint's."""
    from loadstone.loading.meta import destinations

    weights = {q: f"{q.removesuffix(f'.{INPUT}')}.weight" for q in quantizers}
    places = destinations(model, list(weights.values()))
    found = {}
    for quantizer, weight in weights.items():
        place = places[weight]
        if place is None or place.converted:
            raise ArtifactError(
                f"'{quantizer}' belongs to no layer of {type(model).__name__}", "Export again"
            )
        found[quantizer] = model.get_submodule(place.parameter.rpartition(".")[0])
    return found


def hook_input(module: Any, change: Change) -> Any:
    """Pass a layer's input through ``change``, before accelerate's own hooks move it; returns a
    removable handle."""
    return module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))


@contextmanager
def keys_and_values(model: Any, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Pass the keys and values of every attention layer through ``change(quantizer name, tensor)`` for the
    length of a ``with`` block: after rotary positions, before they are multiplied, as a quantized cache
    would hold them."""
    before = switch_attention(model, change)
    try:
        yield
    finally:
        model.config._attn_implementation = before


def switch_attention(model: Any, change: Callable[[str, torch.Tensor], torch.Tensor]) -> str:
    """The same without an end; returns the attention implementation to go back to."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = str(model.config._attn_implementation)
    base = before if before in ALL_ATTENTION_FUNCTIONS else "sdpa"
    compute = ALL_ATTENTION_FUNCTIONS[base]
    names = {module: name for name, module in model.named_modules()}

    def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        name = names[module]
        return compute(
            module, query, change(f"{name}.{KEYS}", key), change(f"{name}.{VALUES}", value), *args, **options
        )

    chosen = f"loadstone-kv-{id(model)}"
    ALL_ATTENTION_FUNCTIONS.register(chosen, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(chosen, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.config._attn_implementation = chosen
    return before


def apply_state(model: Any, state: QuantizerState) -> int:
    """Make ``model`` round its layer inputs, keys and values as ``state`` says; how many quantizers are
    on."""
    from loadstone.fakequant.formats.fold import fold_input

    def rounding(quantizer: str) -> Change:
        spec: Any = state.specs[quantizer]
        amax, scale = state.amax(quantizer), state.tensors.get(f"{quantizer}.pre_quant_scale")

        def change(x: torch.Tensor) -> torch.Tensor:
            if scale is not None:
                x = x * scale.to(x)
            return fold_input(x, spec, None if amax is None else amax.to(x.device))

        return change

    inputs = [name for name in state.specs if name.endswith(f".{INPUT}")]
    for quantizer, module in input_modules(model, inputs).items():
        hook_input(module, rounding(quantizer))
    cached = {name: rounding(name) for name in state.specs if name.endswith((KEYS, VALUES))}
    if cached:
        switch_attention(model, lambda name, x: cached[name](x) if name in cached else x)
    return len(state.specs)


def apply_export(model: Any, artifact: Artifact) -> int:
    """The same for an export's own quantizers; 0 for any other artifact."""
    if artifact.kind != FAKEQUANT:
        return 0
    return apply_state(model, read_state(Path(artifact.path)))

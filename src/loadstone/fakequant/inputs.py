"""Quantizers of layer inputs and of keys and values in a running transformers model, as hooks that can
be removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from loadstone.artifact.files import following_links
from loadstone.artifact.kinds import FAKEQUANT
from loadstone.errors import ArtifactError
from loadstone.fakequant.state import INPUT, QuantizerState, read_state
from loadstone.loading.layer_inputs import Change

if TYPE_CHECKING:
    import torch

    from loadstone.artifact import Artifact

KEYS, VALUES = "k_bmm_quantizer", "v_bmm_quantizer"


def change_quantizer_inputs(model: Any, changes: Mapping[str, Change]) -> Callable[[], None]:
    """Pass the input of each quantizer's layer through its change; returns what takes it all back.

    Quantizers are named after a checkpoint's weights (``<module>.input_quantizer``) or after fused experts in the model
    (``<experts>.down_proj_input_quantizer``). Raises `ArtifactError` for one that belongs to no layer.
    """
    from loadstone.loading.layer_inputs import change_inputs
    from loadstone.loading.meta import destinations

    weights = {
        name: f"{name.removesuffix(f'.{INPUT}')}.weight" for name in changes if name.endswith(f".{INPUT}")
    }
    places = destinations(model, list(weights.values())) if weights else {}
    found = {}
    for name, change in changes.items():
        place = places[weights[name]] if name in weights else None
        if name in weights and (place is None or place.converted):
            raise ArtifactError(f"'{name}' belongs to no layer of {type(model).__name__}", "Export again")
        found[place.parameter if place else name.removesuffix(f"_{INPUT}")] = change
    try:
        return change_inputs(model, found)
    except ArtifactError as error:
        raise ArtifactError(f"a quantizer belongs to no layer: {error.message}", "Export again") from None


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
    # Weakly: transformers keeps the function for good, and must not keep the model with it.
    names = WeakKeyDictionary({module: name for name, module in model.named_modules()})

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

    change_quantizer_inputs(model, {name: rounding(name) for name in state.specs if name.endswith(INPUT)})
    cached = {name: rounding(name) for name in state.specs if name.endswith((KEYS, VALUES))}
    if cached:
        switch_attention(model, lambda name, x: cached[name](x) if name in cached else x)
    return len(state.specs)


def apply_export(model: Any, artifact: Artifact) -> int:
    """The same for an export's own quantizers; 0 for any other artifact."""
    if artifact.kind != FAKEQUANT:
        return 0
    with following_links(artifact.follow_links):
        state = read_state(Path(artifact.path))
    return apply_state(model, state)

"""Quantizers of layer inputs and of keys and values in a running transformers model, as hooks that can
be removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from loadstone.artifact.kinds import FAKEQUANT
from loadstone.errors import ArtifactError
from loadstone.fakequant.state import EXPERT_WEIGHTS, INPUT, QuantizerState, read_state

if TYPE_CHECKING:
    import torch

    from loadstone.artifact import Artifact

KEYS, VALUES = "k_bmm_quantizer", "v_bmm_quantizer"
Change = Callable[["torch.Tensor"], "torch.Tensor"]


def input_modules(model: Any, quantizers: list[str]) -> dict[str, Any]:
    """The module in ``model`` whose input each ``<module>.input_quantizer`` is about; names are a
    checkpoint's."""
    if not quantizers:
        return {}
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


def change_inputs(model: Any, changes: Mapping[str, Change]) -> Callable[[], None]:
    """Pass the input of each quantizer's layer through its change; returns what takes it all back.

    Layers are changed before accelerate's own hooks move their inputs. Raises `ArtifactError` for a quantizer that
    belongs to no layer.
    """
    undo = ExitStack()
    names = [name for name in changes if name.endswith(f".{INPUT}")]
    for name, module in input_modules(model, names).items():
        undo.callback(_hook_input(module, changes[name]).remove)
    for name in changes.keys() - set(names):
        owner, _, kind = name.rpartition(".")
        weight = kind.removesuffix(f"_{INPUT}")
        try:
            experts = model.get_submodule(owner)
        except AttributeError:
            experts = None
        if weight not in EXPERT_WEIGHTS or not hasattr(experts, "_apply_gate"):
            raise ArtifactError(f"'{name}' belongs to no layer of {type(model).__name__}", "Export again")
        if weight == "down_proj":
            _change_between(experts, changes[name], undo)
        else:
            undo.callback(_hook_input(experts, changes[name]).remove)
    return undo.close


def _hook_input(module: Any, change: Change) -> Any:
    return module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))


def _change_between(experts: Any, change: Change, undo: ExitStack) -> None:
    """Change what fused experts multiply by their last weight: the gated product, or the activation's output."""
    if not experts.has_gate:
        undo.callback(experts.act_fn.register_forward_hook(lambda m, args, out: change(out)).remove)
        return
    gate = experts._apply_gate
    experts._apply_gate = lambda x: change(gate(x))
    undo.callback(delattr, experts, "_apply_gate")
    before = experts.config._experts_implementation
    if before not in ("grouped_mm", "batched_mm"):
        # The others compute the gate in place or in a kernel.
        experts.config._experts_implementation = "grouped_mm"
        undo.callback(setattr, experts.config, "_experts_implementation", before)


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

    change_inputs(model, {name: rounding(name) for name in state.specs if name.endswith(INPUT)})
    cached = {name: rounding(name) for name in state.specs if name.endswith((KEYS, VALUES))}
    if cached:
        switch_attention(model, lambda name, x: cached[name](x) if name in cached else x)
    return len(state.specs)


def apply_export(model: Any, artifact: Artifact) -> int:
    """The same for an export's own quantizers; 0 for any other artifact."""
    if artifact.kind != FAKEQUANT:
        return 0
    return apply_state(model, read_state(Path(artifact.path)))

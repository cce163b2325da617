"""An export's quantizers in a vLLM model: the same rounding as in transformers, on vLLM's merged layers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from loadstone.errors import ArtifactError, UsageError
from loadstone.fakequant.formats.fold import fold_input
from loadstone.fakequant.inputs import KEYS, VALUES
from loadstone.fakequant.state import INPUT, QuantizerState

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# vLLM computes logits from the head's weight and never calls it as a layer.
_NEVER_CALLED = ("ParallelLMHead", "VocabParallelEmbedding")


def apply_to_vllm(model: Any, state: QuantizerState, tensor_parallel: int = 1) -> int:
    """Hook every layer of a vLLM model whose input, keys or values ``state`` quantizes; how many layers
    that is.

    Layers that vLLM merges (q, k and v; gate and up) share one input: their quantizers must be of one kind,
    and the largest range counts. Raises `ArtifactError` for a quantizer that finds no layer, `UsageError`
    for one that cannot be divided among ranks.
    """
    modules = dict(model.named_modules())
    merged = {part: whole for whole, parts in _packed(model).items() for part in parts}
    groups: dict[str, list[str]] = {}
    for name, spec in state.specs.items():
        owner, _, kind = name.rpartition(".")
        if tensor_parallel > 1 and (spec == "fp8-token" or f"{name}.pre_quant_scale" in state.tensors):
            raise UsageError(f"'{name}' cannot be divided among {tensor_parallel} ranks", "Use one GPU")
        if kind == INPUT:
            parent, _, leaf = owner.rpartition(".")
            owner = f"{parent}.{merged[leaf]}" if leaf in merged and owner not in modules else owner
        elif kind.endswith(f"_{INPUT}"):
            raise ArtifactError(
                f"'{name}': vLLM computes experts in one kernel, which rounds nothing on its way",
                "Serve it with vLLM's own worker (weights only), or measure it by loadstone eval",
            )
        groups.setdefault(f"{owner}.{kind}", []).append(name)
    for target, names in groups.items():
        owner, _, kind = target.rpartition(".")
        _hook(modules, owner, kind, names, state)
    return len(groups)


def _packed(model: Any) -> dict[str, list[str]]:
    """vLLM's own table of merged layers: ``{"qkv_proj": ["q_proj", "k_proj", "v_proj"], …}``."""
    return dict(getattr(model, "packed_modules_mapping", None) or {})


def _hook(modules: dict[str, Any], owner: str, kind: str, names: list[str], state: QuantizerState) -> None:
    kinds = {state.specs[name] for name in names}
    if len(kinds) > 1:
        raise ArtifactError(
            f"'{owner}' is one layer in vLLM and its parts are quantized differently ({', '.join(sorted(kinds))})",
            "Export with one format for them",
        )
    spec: Any = kinds.pop()
    ranges = [amax for name in names if (amax := state.amax(name)) is not None]
    amax = max(ranges, key=float) if ranges else None
    scales = [state.tensors.get(f"{name}.pre_quant_scale") for name in names]
    scale = scales[0]
    if any(s is not scale and (s is None or scale is None or not s.equal(scale)) for s in scales):
        raise ArtifactError(
            f"'{owner}' is one layer in vLLM and its parts smooth their input differently ({', '.join(names)})",
            "Give layers that share an input one pre_quant_scale, or measure it by loadstone eval",
        )

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if scale is not None:
            x = x * scale.to(x)
        return fold_input(x, spec, None if amax is None else amax.to(x.device))

    if kind in (KEYS, VALUES):
        position = 1 if kind == KEYS else 2
        attention = modules.get(f"{owner}.attn")
        if attention is None:
            raise ArtifactError(
                f"'{names[0]}' finds no attention layer '{owner}.attn' in vLLM's model", _AGAIN
            )
        attention.register_forward_pre_hook(
            lambda m, args: (*args[:position], rounded(args[position]), *args[position + 1 :])
        )
        return
    module = modules.get(owner)
    if module is None:
        raise ArtifactError(f"'{names[0]}' finds no layer '{owner}' in vLLM's model", _AGAIN)
    if type(module).__name__ in _NEVER_CALLED:
        log.warning("'%s' is not applied: vLLM does not call %s as a layer", names[0], type(module).__name__)
        return
    module.register_forward_pre_hook(lambda m, args: (rounded(args[0]), *args[1:]))


_AGAIN = "Export again, or serve it with vLLM's own worker (weights only)"

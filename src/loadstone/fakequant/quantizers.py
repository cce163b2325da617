"""Quantizers inside a live model, torchao's (QAT) and NVIDIA ModelOpt's, recognised by their class."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loadstone.errors import ArtifactError
from loadstone.fakequant.formats.spec import Format, Own
from loadstone.fakequant.inputs import KEYS, VALUES
from loadstone.fakequant.offload import data_of
from loadstone.fakequant.rules import Role, RuleSet, module_of
from loadstone.fakequant.state import INPUT, QuantizerState
from loadstone.loading.layer_inputs import EXPERT_WEIGHTS

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_TYPES = {
    "TensorQuantizer": "modelopt.torch.quantization",
    "SequentialQuantizer": "modelopt.torch.quantization",
    "FakeQuantizerBase": "torchao.quantization.qat",
}
_WEIGHT_NAMES = ("weight_quantizer", "weight_fake_quantizer")
_MODELOPT_INPUTS = {"8": "int8", "(4, 3)": "fp8"}
# ModelOpt's quantizers of fused experts: one for each expert's weight, one for the input of all of them.
_OF_EXPERTS = re.compile(rf"^(.+\.(?:{'|'.join(EXPERT_WEIGHTS)}))_(?:weight_quantizers\.(\d+)|{INPUT})$")


def is_quantizer(module: Any) -> bool:
    """Whether a module is a quantizer: by its class, so that real weights called ``quantizer`` stay
    weights."""
    return any(
        (owner := _TYPES.get(cls.__name__)) is not None and cls.__module__.startswith(owner)
        for cls in type(module).__mro__
    )


@dataclass(frozen=True)
class ExpertQuantizers:
    """The quantizers of a fused weight (experts, out, in), one for each expert; None: left as it is."""

    each: tuple[Any, ...]


@dataclass
class OwnQuantizers:
    """``weights``: weight's name in the state dict -> its enabled quantizer, or its experts'; ``inputs``: name ->
    ModelOpt's quantizer of a layer's input, of keys or of values; ``prefixes``: names that belong to quantizers;
    ``done``: weights folded so far."""

    model: Any
    weights: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    done: set[str] = field(default_factory=set)

    def owns(self, name: str) -> bool:
        """Whether a name in the state dict is part of a quantizer, not of the model."""
        return name.startswith(self.prefixes)

    def folded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` after its own quantizer; itself when it has none. Raises `ArtifactError` with the
        name."""
        scale = self._smoothing(name)
        quantizer = self.weights.get(name)
        if name in self.done:
            raise ArtifactError(f"tensor '{name}' came to its quantizer twice", "Export the model again")
        if quantizer is None and scale is None:
            return tensor
        import torch

        with torch.no_grad():
            if quantizer is not None:
                tensor = _applied(quantizer, name, tensor)
                self.done.add(name)
            if scale is not None:
                tensor = (tensor * scale.to(tensor.dtype)[None, :]).to(tensor.dtype)
        return tensor

    def _smoothing(self, name: str) -> torch.Tensor | None:
        """The scale of a disabled input quantizer, which would never be applied: it goes into the weight."""
        quantizer = self.inputs.get(f"{module_of(name)}.{INPUT}")
        if quantizer is None or quantizer.is_enabled:
            return None
        return getattr(quantizer, "_pre_quant_scale", None)

    def roles(self, roles: dict[str, Role]) -> dict[str, Role]:
        """Where a model has quantizers of its own, they alone decide."""
        return {k: replace(r, eligible=False) for k, r in roles.items()} if self.weights else roles

    def rules(self, rules: RuleSet, saved: Mapping[str, Sequence[str]]) -> RuleSet:
        """``rules``, and of each weight what its own quantizer does to it; ``saved``: names it is saved as."""
        own = {
            key: Format(kind_of(q), Own(kind_of(q)))
            for name, q in self.weights.items()
            for key in saved[name]
        }
        return replace(rules, own=own)

    def check_done(self) -> None:
        """Raise `ArtifactError` when an enabled quantizer's weight was never folded."""
        left = sorted(set(self.weights) - self.done)
        if left:
            raise ArtifactError(
                f"tensor '{left[0]}' has an enabled quantizer and was not folded", "Export again"
            )

    def added_to(self, state: QuantizerState) -> QuantizerState:
        """``state`` and the model's own enabled input quantizers."""
        found, tensors = dict(state.specs), dict(state.tensors)
        for name, quantizer in self.inputs.items():
            if not quantizer.is_enabled:
                continue
            spec = _input_spec(name, quantizer)
            found[name] = spec
            for key in ("_amax", "_pre_quant_scale"):
                value = getattr(quantizer, key, None)
                if value is not None:
                    value = value.detach().float().cpu()
                    tensors[f"{name}.{key[1:]}"] = value.reshape(()) if value.numel() == 1 else value
        return QuantizerState(found, tensors)


def kind_of(quantizer: Any) -> str:
    """The class of a quantizer; of experts' quantizers that of the first."""
    each = quantizer.each if isinstance(quantizer, ExpertQuantizers) else (quantizer,)
    return next(type(q).__name__ for q in each if q is not None)


def _applied(quantizer: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(quantizer, ExpertQuantizers):
        import torch

        pairs = zip(quantizer.each, tensor, strict=True)
        return torch.stack(
            [w if q is None else _applied(q, f"{name}[{i}]", w) for i, (q, w) in enumerate(pairs)]
        )
    # A copy: fake quantizers keep the scales of their last call, and those of the model's must stay.
    private = copy.deepcopy(quantizer)
    try:
        return private(tensor.float()).to(tensor.dtype) if _is_modelopt(private) else private(tensor)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"tensor '{name}': its {type(quantizer).__name__} cannot run here ({reason})",
            "Export with a format instead",
        ) from None


def _input_spec(name: str, quantizer: Any) -> str:
    blocks = getattr(quantizer, "block_sizes", None) or {}
    if blocks.get("type") == "dynamic" and blocks.get("scale_bits") == (4, 3):
        return "nvfp4"
    if blocks.get("type") == "dynamic" and blocks.get("scale_bits") == (8, 0):
        return "mxfp8" if quantizer.num_bits == (4, 3) else "mxfp4"
    spec = _MODELOPT_INPUTS.get(str(quantizer.num_bits))
    if spec is None or blocks:
        raise ArtifactError(
            f"'{name}' quantizes in a way that is not known here", "Disable it, or export by a format"
        )
    return spec


def _is_modelopt(module: Any) -> bool:
    return type(module).__module__.startswith("modelopt.")


def find_quantizers(model: Any) -> OwnQuantizers:
    """Every quantizer of a model, by type."""
    found = OwnQuantizers(model)
    prefixes: list[str] = []
    dropped: list[str] = []
    experts: dict[str, dict[int, Any]] = {}
    for name, module in model.named_modules():
        if not is_quantizer(module):
            continue
        prefixes.append(f"{name}.")
        owner, _, leaf = name.rpartition(".")
        if leaf in _WEIGHT_NAMES:
            if _enabled(module):
                found.weights[f"{owner}.weight"] = _with_data(model, name, module)
        elif _is_modelopt(module) and (match := _OF_EXPERTS.match(name)):
            if match[2] is None:
                _check_unscaled(name, module)
                found.inputs[name] = module
            else:
                kept = _with_data(model, name, module) if _enabled(module) else None
                experts.setdefault(match[1], {})[int(match[2])] = kept
        elif _is_modelopt(module) and leaf in (INPUT, KEYS, VALUES):
            found.inputs[name] = module
        elif _is_modelopt(module) and not name.startswith(tuple(prefixes[:-1])) and _enabled(module):
            raise ArtifactError(f"'{name}' is enabled and an export cannot keep it", "Disable it first")
        elif leaf == "activation_fake_quantizer" and _enabled(module):
            dropped.append(name)
    if dropped:
        log.warning(
            "'%s' (of %d) rounds a layer's input while it trains; the export keeps the weights only",
            dropped[0],
            len(dropped),
        )
    for weight, each in experts.items():
        if any(q is not None for q in each.values()):
            found.weights[weight] = ExpertQuantizers(tuple(each[i] for i in sorted(each)))
    found.prefixes = tuple(prefixes)
    return found


def _check_unscaled(name: str, quantizer: Any) -> None:
    """A disabled quantizer's smoothing would have to go into the weights of all experts."""
    if not quantizer.is_enabled and getattr(quantizer, "_pre_quant_scale", None) is not None:
        raise ArtifactError(f"'{name}' is disabled and smooths its input", "Enable it, or export by a format")


def _enabled(quantizer: Any) -> bool:
    if _is_modelopt(quantizer):
        parts = list(quantizer) if hasattr(quantizer, "__iter__") else [quantizer]
        return any(part.is_enabled for part in parts)
    return bool(getattr(quantizer, "enabled", True))


def _with_data(model: Any, name: str, quantizer: Any) -> Any:
    """The quantizer, or a copy with its offloaded tensors in place."""
    meta = [n for n, t in quantizer.state_dict(keep_vars=True).items() if t.device.type == "meta"]
    if not meta:
        return quantizer
    import torch

    state = model.state_dict(keep_vars=True)
    private = copy.deepcopy(quantizer)
    for local in meta:
        parent, _, leaf = local.rpartition(".")
        data = data_of(model, f"{name}.{local}", state[f"{name}.{local}"])
        target = private.get_submodule(parent)
        if leaf in target._parameters:
            data = torch.nn.Parameter(data, requires_grad=False)
        setattr(target, leaf, data)
    return private

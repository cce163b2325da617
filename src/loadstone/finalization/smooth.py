"""AWQ and SmoothQuant: input features are scaled before a weight is rounded, and divided by that scale as they come in.

AWQ (https://arxiv.org/abs/2306.00978) searches the scale that changes a Linear's outputs least; SmoothQuant
(https://arxiv.org/abs/2211.10438) evens out the ranges of inputs and weights. The formulas are those of torchao's
prototypes (torchao 0.18, ``prototype/awq/core.py``, ``prototype/smoothquant/core.py``), computed from running
statistics instead of stored inputs. Where a torchao class can divide its inputs (``act_pre_scale``) every Linear has a
scale of its own; otherwise Linears that share an input share one, and it is folded into the norm or the Linear before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadstone.finalization.statistics import Inputs
from loadstone.quantization.quantize import dense, quantize_weight
from loadstone.quantization.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import nn

# torchao's: exponents tried are 0, 1/20, … 19/20 of the mean magnitude.
_STEPS = 20
# Migration strength of SmoothQuant, the paper's and torchao's.
_ALPHA = 0.5
# How far float32 rounding may move outputs when a division moves into other weights, as a share of the largest output.
_TOLERANCE = 1e-3
# Linears whose input is elementwise linear in the outputs of another: (before, after) by name within one module.
_PAIRS = (("v_proj", "o_proj"), ("up_proj", "down_proj"))


def awq_scale(
    inputs: Inputs, weights: Sequence[tuple[torch.Tensor, Scheme]], repeat: tuple[int, int, int] | None = None
) -> torch.Tensor:
    """AWQ's scale (in,) for Linears of one input: of torchao's 20, the one whose rounding changes their outputs least.

    ``weights``: (weight (out, in), scheme). ``repeat``: (groups, times, width), of features that repeat a smaller
    vector (groups, width) and so share its scale.
    """
    import torch

    assert inputs.total is not None
    mean = inputs.total / inputs.count
    if repeat:
        mean = _expand(mean.view(repeat).mean(1), repeat)
    best, least = torch.ones_like(mean), torch.inf
    for step in range(_STEPS):
        scale = mean.pow(step / _STEPS).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = sum(_loss(inputs, weight, scheme, scale) for weight, scheme in weights)
        if loss < least:
            best, least = scale, loss
    return best


def smooth_scale(
    inputs: Inputs, weights: Sequence[tuple[torch.Tensor, Scheme]], repeat: tuple[int, int, int] | None = None
) -> torch.Tensor:
    """SmoothQuant's scale (in,) for Linears of one input: sqrt(max |x| / max |w|) by feature."""
    import torch

    eps = torch.finfo(torch.float32).eps
    largest = torch.stack([weight.abs().amax(0) for weight, _ in weights]).amax(0)
    x = inputs.largest
    if repeat:
        x, largest = (_expand(each.view(repeat).amax(1), repeat) for each in (x, largest))
    return (x + eps).pow(_ALPHA) / (largest + eps).pow(1 - _ALPHA)


def _expand(small: torch.Tensor, repeat: tuple[int, int, int]) -> torch.Tensor:
    """(groups, width) -> (groups * times * width,)."""
    return small.unsqueeze(1).expand(repeat).reshape(-1)


def _loss(inputs: Inputs, weight: torch.Tensor, scheme: Scheme, scale: torch.Tensor) -> float:
    """Summed squared change of the Linear's outputs on all calibration inputs."""
    rounded = dense(quantize_weight(weight * scale.to(weight.dtype), scheme))
    change = rounded.float() / scale - weight.float()
    assert inputs.moment is not None
    return float(((change @ inputs.moment) * change).sum())


@dataclass(frozen=True)
class Fold:
    """A division of the inputs of ``linears`` that the weights of module ``before`` can take over.

    ``offset``: what the module adds to its weight before it multiplies (1 for Gemma's norms).
    """

    linears: tuple[str, ...]
    before: str
    offset: float = 0.0
    repeat: tuple[int, int, int] | None = None

    def apply(self, layer: nn.Module, scale: torch.Tensor) -> None:
        """Multiply the Linears' columns by ``scale`` (in,) and divide what comes before by it, in place."""
        for name in self.linears:
            layer.get_submodule(name).weight.data.mul_(scale)  # type: ignore[union-attr, operator]
        if self.repeat:
            scale = scale.view(self.repeat)[:, 0].reshape(-1)
        before: Any = layer.get_submodule(self.before)
        weight = before.weight.data
        weight.copy_((weight + self.offset) / scale.view(-1, *[1] * (weight.dim() - 1)) - self.offset)
        if getattr(before, "bias", None) is not None:
            before.bias.data.div_(scale)


def find_folds(
    layer: nn.Module, names: Sequence[str], run: Callable[[], torch.Tensor], calibrated: Sequence[str]
) -> list[Fold]:
    """Find the folds that a decoder layer allows for the Linears in ``names``; each is proven by running the layer.

    ``run`` gives the layer's output for one input. What a fold changes is a norm or one of the ``calibrated`` Linears.
    """
    outputs: list[tuple[Any, str]] = []
    inputs: dict[str, Any] = {}

    def record_output(name: str) -> Callable[..., None]:
        return lambda module, args, result: outputs.append((result, name))

    def record_input(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(name, args[0])

    handles = [layer.get_submodule(name).register_forward_pre_hook(record_input(name)) for name in names]
    for name, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and own["weight"].dim() == 1:
            handles.append(module.register_forward_hook(record_output(name)))
    expected = _outputs(layer, run)
    for handle in handles:
        handle.remove()
    candidates: list[tuple[Fold, ...]] = []
    for tensor, before in outputs:
        shared = tuple(name for name in names if inputs.get(name) is tensor)
        if shared:
            candidates.append((Fold(shared, before), Fold(shared, before, offset=1.0)))
    for first, second in _PAIRS:
        for name in names:
            parent, _, last = name.rpartition(".")
            before = f"{parent}.{first}" if parent else first
            if last == second and before in calibrated:
                candidates.append((Fold((name,), before, repeat=_repeat(layer, before, name)),))
    found = []
    for choices in candidates:
        fold = next((fold for fold in choices if _holds(layer, fold, run, expected)), None)
        if fold:
            found.append(fold)
    return found


def _repeat(layer: nn.Module, before: str, after: str) -> tuple[int, int, int] | None:
    """How attention repeats value heads for the output projection (heads, times, width); None when it does not."""
    out_features = layer.get_submodule(before).out_features
    read = layer.get_submodule(after).in_features
    width = getattr(layer.get_submodule(before.rpartition(".")[0]), "head_dim", None)
    if out_features == read or not isinstance(width, int) or read % out_features or out_features % width:  # type: ignore[operator]
        return None
    return out_features // width, read // out_features, width  # type: ignore[operator, return-value]


def _outputs(layer: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of one run: of each module that has weights of its own, and of the layer."""
    import torch

    found: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, torch.Tensor):
                found[name] = result

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in layer.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    found[""] = run()
    for handle in handles:
        handle.remove()
    return found


def _holds(
    layer: nn.Module, fold: Fold, run: Callable[[], torch.Tensor], expected: dict[str, torch.Tensor]
) -> bool:
    """Whether folding uneven scales changes no other module's output; the layer's weights are restored."""
    import torch

    first: Any = layer.get_submodule(fold.linears[0])
    before: Any = layer.get_submodule(fold.before)
    features = first.weight.shape[1]
    rows = fold.repeat[0] * fold.repeat[2] if fold.repeat else features
    if before.weight.shape[0] != rows:
        return False
    touched = [
        p
        for name in (*fold.linears, fold.before)
        for p in layer.get_submodule(name).parameters(recurse=False)
    ]
    saved = [p.data.clone() for p in touched]
    scale = torch.linspace(0.5, 2.0, rows, device=first.weight.device)
    if fold.repeat:
        scale = _expand(scale.view(fold.repeat[0], fold.repeat[2]), fold.repeat)
    fold.apply(layer, scale)
    got = _outputs(layer, run)
    for parameter, value in zip(touched, saved, strict=True):
        parameter.data.copy_(value)
    return all(
        bool((got[name] - old).abs().max() <= _TOLERANCE * old.abs().max())
        for name, old in expected.items()
        if name != fold.before
    )

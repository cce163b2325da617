"""How a model uses its weights: embeddings, heads, and Linear weights that are read other than by calling the layer."""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Methods of a model that read weights before or after it computes, never while.
_NOT_COMPUTING = re.compile(r"_*init|.*tie_|reset_parameters|.*resize|_load|from_pretrained")
_WEIGHT_READ = re.compile(r"\.(\w+)\.weight\b")


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The input embeddings; None for a model that has none (most vision and speech models)."""
    return _asked(model.get_input_embeddings)


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The output head of a language model; None for a model that has none."""
    return _asked(model.get_output_embeddings)


def _asked(question: Any) -> nn.Module | None:
    from torch import nn

    try:
        answer = question()
        # Some give the table itself, a parameter.
        return answer if isinstance(answer, nn.Module) else None
    # A class that does not say raises one of these; others look for attributes that they lack.
    except (NotImplementedError, AttributeError):
        return None


def parts_outside(model: PreTrainedModel) -> dict[str, str]:
    """Modules that quantization leaves out by default, by name, with the reason; quantizers elsewhere leave them too.

    These are what lies beside the base model (heads of classifiers and of other tasks) and, in a multimodal model that
    generates text, what lies beside the language model (vision and audio towers, projectors).
    """
    found: dict[str, str] = {}
    base = model.base_model
    if base is not model:
        found |= dict.fromkeys(_beside(model, base), f"outside the base model '{model.base_model_prefix}'")
    if output_head(model) is None or getattr(model.config, "is_encoder_decoder", False):
        return found
    decoder = model.get_decoder()
    if decoder is not base and decoder is not model and any(m is decoder for m in model.modules()):
        towers = any(
            model.get_encoder(modality=kind) not in (model, base, decoder) for kind in ("image", "audio")
        )
        if towers:
            found |= dict.fromkeys(_beside(model, decoder), "outside the language model")
    return found


def _beside(root: nn.Module, inside: nn.Module) -> list[str]:
    """The names of the largest modules of ``root`` that neither hold ``inside`` nor lie in it."""
    beside: list[str] = []
    stack = [("", root)]
    while stack:
        prefix, module = stack.pop()
        for name, child in module.named_children():
            full = f"{prefix}.{name}" if prefix else name
            if child is inside:
                continue
            if any(m is inside for m in child.modules()):
                stack.append((full, child))
            else:
                beside.append(full)
    return beside


def weights_used_otherwise(model: nn.Module) -> dict[str, str]:
    """Linear layers, by module name, whose weight the model reads other than by calling the layer, with the reason.

    A quantized weight serves a call of the layer alone: models that multiply, view or compare the tensor themselves
    (Mamba's ``dt_proj``, `nn.MultiheadAttention`'s ``out_proj``, subclasses of Linear with a forward of their own)
    fail or compute something else. The methods of the modules around a layer are searched for such reads.
    """
    import torch
    from torch import nn

    found: dict[str, str] = {}
    owners: list[tuple[str, nn.Module]] = []
    readers: dict[type, frozenset[str]] = {}
    for name, module in model.named_modules():
        owners.append((name, module))
        if isinstance(module, nn.Linear) and not _is_called_plainly(type(module)):
            found[name] = f"{type(module).__name__} computes with it in its own way"
    for owner_name, owner in owners:
        kind = type(owner)
        if isinstance(owner, nn.MultiheadAttention):
            found[f"{owner_name}.out_proj".lstrip(".")] = "read by nn.MultiheadAttention itself"
        if kind not in readers:
            readers[kind] = _weights_read(kind)
        if not readers[kind]:
            continue
        for name, module in owner.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in readers[kind] and isinstance(module, torch.nn.Linear):
                full = f"{owner_name}.{name}" if owner_name else name
                found.setdefault(full, f"{kind.__name__} reads it itself")
    return found


def _is_called_plainly(kind: type) -> bool:
    """Whether a Linear of this class computes as `nn.Linear` does."""
    from torch import nn

    return kind.forward is nn.Linear.forward  # type: ignore[attr-defined]


def _weights_read(kind: type) -> frozenset[str]:
    """Names ``x`` of which the class reads ``….x.weight`` while it computes; nothing for torch's own classes."""
    names: set[str] = set()
    for parent in kind.__mro__:
        if (
            parent.__module__.partition(".")[0] in ("torch", "builtins")
            or parent.__name__ == "PreTrainedModel"
        ):
            continue
        for method_name, method in vars(parent).items():
            function = inspect.unwrap(getattr(method, "__func__", method))
            if inspect.isfunction(function) and not _NOT_COMPUTING.match(method_name):
                names |= _read_in(function)
    return frozenset(names)


@lru_cache(maxsize=16384)
def _read_in(function: Any) -> frozenset[str]:
    # The compiled code names every attribute: its source is read only where `weight` is among them.
    if "weight" not in _names_in(function.__code__):
        return frozenset()
    try:
        return frozenset(_WEIGHT_READ.findall(inspect.getsource(function)))
    except (OSError, TypeError):
        return frozenset()


def _names_in(code: Any) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= _names_in(constant)
    return names

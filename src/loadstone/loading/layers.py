"""Where the decoder layers of a model are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

# Inductor's options for compiled layers. torchao's int8 recipes turn on its exhaustive tuning for the whole process:
# minutes per layer, no gain.
INDUCTOR: dict[str, Any] = {
    "coordinate_descent_tuning": False,
    "coordinate_descent_check_all_directions": False,
}


class LayerStack(NamedTuple):
    """The list of decoder layers and its name in the model, e.g. ``model.language_model.layers``."""

    name: str
    layers: nn.ModuleList


def layer_stack(model: nn.Module) -> LayerStack | None:
    """The decoder layers of a language model; None if the model has no list of them.

    transformers' ``get_decoder()`` says which part of a multimodal model is the language model. In that part the
    layers are the list of modules that transformers marks as layers (`GradientCheckpointingLayer`) and that has as
    many as the config says, or else the longest; where none is marked, the only list of the right length.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = _decoder(model)
    count = _hidden_layers(decoder)
    lists = list(_module_lists(decoder))
    marked = [each for each in lists if any(isinstance(m, GradientCheckpointingLayer) for m in each)]
    fitting = [each for each in marked or lists if len(each) == count]
    if fitting and (marked or len(fitting) == 1):
        found = fitting[0]
    elif marked:
        found = max(marked, key=len)
    else:
        return None
    return next(LayerStack(name, found) for name, module in model.named_modules() if module is found)


def hidden_parts(model: nn.Module) -> list[nn.Module]:
    """The parts of a model whose last hidden states its own forward may make logits of, the outermost first: its base
    model, and the decoder inside that some forwards call instead (OPT)."""
    from transformers import PreTrainedModel

    parts = (getattr(model, "base_model", model), _decoder(model))
    # Llama 4 names a base model that it does not have.
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return [part for part in dict.fromkeys(parts) if part is not model] or inner[:1]


def _decoder(model: nn.Module) -> nn.Module:
    """The language model inside ``model``: all of it where transformers has no other answer."""
    from torch import nn

    decoder, answer = model, None
    # A language model inside a multimodal one may have an encoder and a decoder of its own: ask it in turn.
    while decoder is not answer:
        ask = getattr(decoder, "get_decoder", None)
        answer, decoder = decoder, ask() if callable(ask) else decoder
        if not isinstance(decoder, nn.Module) or not any(m is decoder for m in answer.modules()):
            return answer
        if next(_module_lists(decoder), None) is None:
            # Named a decoder, but without layers: ModernBERT's output projection.
            return answer
    return decoder


def _hidden_layers(decoder: nn.Module) -> int | None:
    config = getattr(decoder, "config", None)
    if config is None:
        return None
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_layers", None):
        return int(config.decoder_layers)
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _module_lists(root: nn.Module) -> Iterator[nn.ModuleList]:
    """All lists of modules that are not empty, the outermost first."""
    from torch import nn

    level = [root]
    while level:
        yield from (m for m in level if isinstance(m, nn.ModuleList) and len(m))
        level = [child for module in level for child in module.children()]

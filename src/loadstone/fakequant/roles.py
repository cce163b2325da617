"""What each stored tensor is in its model: a Linear's weight, an expert's, an embedding, the head, or
something else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from loadstone.artifact import TensorInfo
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES
from loadstone.errors import ArtifactError
from loadstone.fakequant.rules import Role
from loadstone.fakequant.state import INPUT
from loadstone.finalization.division import stored_layout
from loadstone.loading.layer_inputs import sees_experts
from loadstone.quantization.model_facts import expert_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loadstone.loading.complete import Destination

_VECTOR = Role(False, "not a matrix", matrix=False)
_LINEAR = Role(True, inputs=True)
_CONV1D = Role(True, transposed=True, inputs=True)
_HEAD = Role(False, "output head", inputs=True)
_ROUTER = Role(False, "router", inputs=True)
_EMBEDDING = Role(False, "embedding")


def roles_in(model: PreTrainedModel, infos: dict[str, TensorInfo], ties: dict[str, str]) -> dict[str, Role]:
    """The role of each stored tensor, by the module that it loads into. ``model`` may be on the meta device. ``ties``:
    names that are one tensor with a stored one, which have roles of their own.

    Raises `ArtifactError` for a tensor that belongs to no part of the model.
    """
    from loadstone.loading.complete import CHECK_CONFIG, UNEXPECTED, ignored_keys
    from loadstone.loading.meta import destinations
    from loadstone.quantization.weight_use import output_head

    infos = {t: infos[s]._replace(name=t) for t, s in ties.items() if s in infos} | infos
    where = destinations(model, list(infos))
    ignored = ignored_keys(model, infos, [key for key, place in where.items() if place is None])
    head = output_head(model)
    roles: dict[str, Role] = {}
    for key, info in infos.items():
        place = where[key]
        if place is None and key not in ignored:
            raise ArtifactError(
                f"{info.file}: tensor '{key}' {UNEXPECTED} ({type(model).__name__})", CHECK_CONFIG
            )
        if place is None or len(info.shape) not in (2, 3) or info.dtype not in FLOAT_DTYPES:
            roles[key] = _VECTOR
            continue
        roles[key] = _role(model, place, info, head)
    return roles


def _role(model: PreTrainedModel, place: Destination, info: TensorInfo, head: Any) -> Role:
    import torch
    from transformers.pytorch_utils import Conv1D

    owner_name, _, leaf = place.parameter.rpartition(".")
    owner: Any = model.get_submodule(owner_name)
    if owner is head:
        return _HEAD
    if isinstance(owner, Conv1D) and leaf == "weight":
        return _CONV1D
    if isinstance(owner, torch.nn.Linear) and leaf == "weight":
        parent = model.get_submodule(owner_name.rpartition(".")[0])
        is_router = owner_name.endswith(("router", "gate")) and hasattr(parent, "experts")
        kept = getattr(model, "_keep_in_fp32_modules", None) or ()
        if any(f".{part}." in f".{owner_name}." for part in kept):
            return Role(False, "kept in float32", inputs=True)
        return _ROUTER if is_router else _LINEAR
    if isinstance(owner, torch.nn.Embedding):
        return _EMBEDDING
    parameter = getattr(owner, leaf)
    if parameter.dim() == 3 and "expert" in f"{owner_name} {type(owner).__name__}".lower():
        # Two stored dimensions: an expert of its own, merged with the others on load.
        layout = stored_layout(
            expert_layout(owner, leaf), place.operations, info.shape, tuple(parameter.shape)
        )
        transposed = layout is not None and layout.transposed and len(info.shape) == 3
        # transformers' own scheme for experts, whose inputs can be changed on their way (inputs.py).
        known = sees_experts(owner, leaf)
        return Role(True, transposed=transposed, shared=f"{owner_name}.{leaf}_{INPUT}" if known else "")
    return Role(False, f"weight of a {type(owner).__name__}, not a Linear")


def roles_by_name(infos: dict[str, TensorInfo]) -> dict[str, Role]:
    """The same by names and shapes alone, for a model whose class transformers does not have."""
    roles: dict[str, Role] = {}
    for key, info in infos.items():
        module = key.removesuffix(".weight")
        if len(info.shape) != 2 or module == key or info.dtype not in FLOAT_DTYPES:
            roles[key] = _VECTOR
        elif re.search(r"embed|(^|\.)(wte|wpe)$", module):
            roles[key] = _EMBEDDING
        elif re.search(r"(^|\.)(lm_head|embed_out|output|score|classifier)$", module):
            roles[key] = _HEAD
        elif re.search(r"(^|\.)(router|gate)$", module):
            roles[key] = _ROUTER
        elif "norm" in module.rpartition(".")[2]:
            roles[key] = _VECTOR
        else:
            roles[key] = _LINEAR
    return roles

"""A model divided among ranks by transformers' tensor-parallel plan: each reads, holds and computes its part of every
layer, and the ranks add their partial results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from loadstone.errors import UsageError
from loadstone.loading.meta import meta_model
from loadstone.loading.plan import NATIVE, NATIVE_QUANTIZED, NATIVE_UNPACKED, LoadPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Styles of a whole result on every rank: their rows need not divide evenly.
_GATHERED = ("embedding_rowwise", "embedding_colwise", "colwise_gather_output", "colwise_rep")


@contextmanager
def divided(model_class: Any, mesh: Any) -> Iterator[None]:
    """Within the block `from_pretrained` of this class loads, on each rank of the one-dimensional ``mesh``, its part.

    `from_pretrained` itself divides a model among all ranks of a job only. Its loader reads the part of a parameter
    that is a DTensor, so the plan is applied between construction and load.
    """
    load = model_class._load_pretrained_model

    def load_part(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
        _apply_plan(model, mesh)
        return load(model, *args, **options)

    model_class._load_pretrained_model = staticmethod(load_part)
    try:
        yield
    finally:
        del model_class._load_pretrained_model


def _apply_plan(model: PreTrainedModel, mesh: Any) -> None:
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model._tp_plan = tensor_plan(model)
    if hasattr(model, "_expand_parallel_plan"):
        apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(model._tp_plan))
    else:  # transformers before 5.20
        apply_tensor_parallelism(model, mesh)


def tensor_plan(model: PreTrainedModel) -> dict[str, str]:
    """The model's plan: module or parameter name, ``*`` for a layer's number -> style; empty where it has none.

    Before 5.20 transformers divided the head and not the embedding. Where these are one weight, it stays whole.
    """
    plan = dict(model.tp_plan or {})
    for pair in model.all_tied_weights_keys.items():
        rules = [_rule(name, plan) for name in pair]
        if None in rules:
            plan = {name: style for name, style in plan.items() if name not in rules}
    return plan


def _rule(parameter: str, plan: Mapping[str, str]) -> str | None:
    """The entry of a plan that a parameter is divided by."""
    from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

    name: str = replace_layer_number_by_wildcard(parameter)
    return next((each for each in (name, name.rpartition(".")[0]) if each in plan), None)


def divided_share(plan: LoadPlan, ranks: int) -> float:
    """The share of a model's numbers that each of ``ranks`` holds when it is divided among them.

    Raises UsageError for a model that cannot be.
    """
    name = f"'{plan.artifact.root}'"
    if plan.load_path not in (NATIVE, NATIVE_QUANTIZED, NATIVE_UNPACKED):
        raise UsageError(f"{name} cannot be divided among ranks: {plan.reason}", "Leave --parallel out")
    if plan.artifact.quantized:
        raise UsageError(
            f"{name} cannot be divided among ranks: its tensors are torchao's",
            "Leave --parallel out",
        )
    model = meta_model(plan.artifact, plan.trust_remote_code)
    rules = tensor_plan(model)
    if not rules:
        raise UsageError(
            f"transformers has no tensor-parallel plan for {type(model).__name__} ({name})",
            "Leave --parallel out: a model that does not fit is then streamed layer by layer",
        )
    _check_heads(model, rules, ranks, name)
    held = whole = 0
    for parameter, tensor in model.named_parameters():
        rule = _rule(parameter, rules)
        part = tensor.numel()
        if rule is not None:
            part = _part(parameter, tuple(tensor.shape), rules[rule], ranks, name)
        held, whole = held + part, whole + tensor.numel()
    return held / whole


def _part(parameter: str, shape: tuple[int, ...], style: str, ranks: int, name: str) -> int:
    """The numbers of a parameter that one rank holds."""
    if style in _GATHERED:
        return -(-prod(shape) // ranks)
    if "colwise" in style:
        size = shape[-2] if len(shape) > 1 else shape[0]
    elif "rowwise" in style and len(shape) > 1:
        size = shape[-1]
    else:
        return prod(shape)
    each = ranks * 2 if style.startswith("packed") else ranks
    if size % each:
        raise UsageError(
            f"{name}: {size} {'rows' if 'colwise' in style else 'columns'} of '{parameter}' do not divide among "
            f"{ranks} ranks",
            "Use fewer: --parallel tensor=N",
        )
    return prod(shape) // ranks


def _check_heads(model: PreTrainedModel, rules: Mapping[str, str], ranks: int, name: str) -> None:
    config = model.config.get_text_config()
    if not any("attn" in rule or "attention" in rule for rule in rules):
        return
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        for count in heads if isinstance(heads, list | tuple) else [heads]:
            if isinstance(count, int) and count % ranks:
                raise UsageError(
                    f"{name}: its {field} ({count}) do not divide among {ranks} ranks",
                    "Use fewer: --parallel tensor=N",
                )

"""A model divided among ranks by transformers' tensor-parallel plan: each reads, holds and computes its part of every
layer, and the ranks add their partial results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, FlatTensor
from loadstone.errors import ArtifactError, UsageError
from loadstone.loading.meta import meta_model
from loadstone.loading.model_class import is_own_code
from loadstone.loading.plan import NATIVE, NATIVE_QUANTIZED, NATIVE_UNPACKED, LoadPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Styles of a whole result on every rank: their rows need not divide evenly.
_GATHERED = ("embedding_rowwise", "embedding_colwise", "colwise_gather_output", "colwise_rep")
# Models whose plan in transformers 5.23 gives other numbers (Gemma3n and HRM: a statistic over a divided dimension), or
# fails when it runs. Every other causal language model of that version gives those of one rank.
_BROKEN = (
    "doge",
    "dots3_note",
    "dots3_note_text",
    "gemma3n",
    "gemma3n_text",
    "gemma4",
    "hrm_text",
    "inkling_text",
)
# torchao's tensors that can be cut along both sides.
_DIVISIBLE = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")


@contextmanager
def divided(model_class: Any, mesh: Any) -> Iterator[None]:
    """Within the block `from_pretrained` of this class loads, on each rank of the one-dimensional ``mesh``, its part.

    `from_pretrained` itself divides a model among all ranks of a job only. Its loader reads the part of a parameter
    that is a DTensor, so the plan is applied between construction and load.
    """
    _let_parts_be_viewed()
    load = model_class._load_pretrained_model

    def load_part(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
        _apply_plan(model, mesh)
        return load(model, *args, **options)

    model_class._load_pretrained_model = staticmethod(load_part)
    try:
        yield
    finally:
        del model_class._load_pretrained_model


@contextmanager
def failing_together(mesh: Any, artifact: Artifact) -> Iterator[None]:
    """A load that fails on one rank of the ``mesh`` raises `ArtifactError` on the others, which would wait for it."""
    import torch
    import torch.distributed as dist

    failed = torch.zeros(1, device=mesh.device_type)
    try:
        yield
    except Exception:
        dist.all_reduce(failed + 1, group=mesh.get_group())
        raise
    dist.all_reduce(failed, group=mesh.get_group())
    if failed:
        raise ArtifactError(f"'{artifact.root}' cannot be loaded by another rank", "See what that rank says")


def _let_parts_be_viewed() -> None:
    """DTensor takes a part by `view_as` itself, which of torchao's tensors Float8Tensor alone answers."""
    import torch
    from torch.utils._python_dispatch import return_and_correct_aliasing
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    def view(function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        tensor, shape = args
        if tuple(shape) != tuple(tensor.shape):
            raise NotImplementedError(f"{type(tensor).__name__} has no other shape than its own")
        alike = tensor._apply_fn_to_data(lambda part: part.view(part.shape))
        return return_and_correct_aliasing(function, args, kwargs, alike)

    for kind in (Int8Tensor, IntxUnpackedToInt8Tensor):
        kind.implements(torch.ops.aten.view.default)(view)


def _apply_plan(model: PreTrainedModel, mesh: Any) -> None:
    from transformers.distributed import tensor_parallel

    plan = tensor_plan(model)
    if not hasattr(
        model, "_expand_parallel_plan"
    ):  # transformers before 5.20 has one table of both kinds of styles
        model._tp_plan = plan
        tensor_parallel.apply_tensor_parallelism(model, mesh)
        return
    experts = {rule: style for rule, style in plan.items() if style == model.ep_plan.get(rule)}
    rest = {rule: style for rule, style in plan.items() if rule not in experts}
    tensor_parallel.apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(rest))
    if experts:
        from transformers.distributed.expert_parallel import apply_expert_parallelism

        apply_expert_parallelism(model, mesh, mesh, model._expand_parallel_plan(experts))


def tensor_plan(model: PreTrainedModel) -> dict[str, str]:
    """The model's plan: module or parameter name, ``*`` for a layer's number -> style; empty where it has none for its
    layers.

    Where the tensor-parallel plan divides the head alone, the expert-parallel one is taken too: whole experts are then
    divided among the ranks, which all see every token (gpt-oss).
    """
    plan = dict(model.tp_plan or {})
    if not any("*" in rule for rule in plan):
        plan |= model._ep_plan or {}
    if not any("*" in rule for rule in plan):
        return {}
    # Before 5.20 transformers divided the head and not the embedding. Where these are one weight, it stays whole.
    for pair in model.all_tied_weights_keys.items():
        rules = [_rule(name, plan) for name in pair]
        if None in rules:
            plan = {name: style for name, style in plan.items() if name not in rules}
    return plan


def _indivisible(tensor: FlatTensor) -> str:
    """Why torchao's product of a part of a quantized weight is not that part of the product; empty where it is."""
    attributes = tensor.attributes
    if (
        attributes.get("act_quant_kwargs")
        or attributes.get("activation_quantization")
        or "act_pre_scale" in tensor.parts
    ):
        return f"'{tensor.name}' rounds or scales its inputs, which no rank sees whole"
    if tensor.type not in _DIVISIBLE or len(tensor.shape) != 2:
        return f"torchao does not cut '{tensor.name}' ({tensor.type}, {len(tensor.shape)} dimensions)"
    return ""


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
    if reason := next(filter(None, map(_indivisible, plan.artifact.quantized.values())), ""):
        raise UsageError(f"{name} cannot be divided among ranks: {reason}", "Leave --parallel out")
    model = meta_model(plan.artifact, plan.trust_remote_code)
    if is_own_code(type(model)):
        raise UsageError(f"{name} cannot be divided among ranks: {plan.reason}", "Leave --parallel out")
    rules = tensor_plan(model)
    kind = type(model).__name__
    if not rules or model.config.model_type in _BROKEN:
        raise UsageError(
            f"{name}: transformers has no tensor-parallel plan {'that works ' if rules else ''}for {kind}",
            "Leave --parallel out: a model that does not fit is then streamed layer by layer",
        )
    _check_heads(model, rules, ranks, name)
    for tensor in plan.artifact.quantized.values():
        group = (tensor.attributes.get("block_size") or [1])[-1]
        rowwise = "rowwise" in rules.get(_rule(tensor.name, rules) or "", "")
        if rowwise and group < tensor.shape[-1] and tensor.shape[-1] // ranks % group:
            raise UsageError(
                f"{name}: the groups of {group} columns of '{tensor.name}' do not divide among {ranks} ranks",
                "Use fewer: --parallel tensor=N",
            )
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
    what = "rows"
    if style == "grouped_gemm":
        size, what = shape[0], "experts"
    elif "colwise" in style:
        size = shape[-2] if len(shape) > 1 else shape[0]
    elif "rowwise" in style and len(shape) > 1:
        size, what = shape[-1], "columns"
    else:
        return prod(shape)
    each = ranks * 2 if style.startswith("packed") else ranks
    if size % each:
        raise UsageError(
            f"{name}: {size} {what} of '{parameter}' do not divide among {ranks} ranks",
            "Use fewer: --parallel tensor=N",
        )
    return prod(shape) // ranks


def _check_heads(model: PreTrainedModel, rules: Mapping[str, str], ranks: int, name: str) -> None:
    if not any("attn" in rule or "attention" in rule for rule in rules):
        return
    config = model.config.get_text_config()
    layers = getattr(config, "per_layer_config", None) or [config]
    for field in ("num_attention_heads", "num_key_value_heads"):
        for layer in layers:
            heads = getattr(layer, field, None)
            if isinstance(heads, int) and heads % ranks:
                raise UsageError(
                    f"{name}: its {field} ({heads}) do not divide among {ranks} ranks",
                    "Use fewer: --parallel tensor=N",
                )

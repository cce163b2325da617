"""How a model uses its weights: embeddings, heads, and Linear weights that are read other than by calling the layer."""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Methods of a model that read weights before or after it computes, never while.
_NOT_COMPUTING = re.compile(r"_*init|.*tie_|reset_parameters|.*resize|_load|from_pretrained")
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class _Read(NamedTuple):
    """``x`` of a read ``….x.weight``, and the tests of the branches around it with the answers that lead there."""

    name: str
    tests: tuple[tuple[ast.expr, bool], ...]


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
    fail or compute something else. The methods of the modules around a layer are searched for such reads, but for
    branches that are taken in training only (``out_proj`` of Mamba 2) or that the config switches off (BLOOM's slices).
    """
    from torch import nn

    found: dict[str, str] = {}
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    configs = list({id(config): config for config in configs}.values())
    reads: dict[type, tuple[_Read, ...]] = {}
    for owner_name, owner in model.named_modules():
        kind = type(owner)
        if isinstance(owner, nn.Linear) and not _is_called_plainly(kind):
            found[owner_name] = f"{kind.__name__} computes with it in its own way"
        if isinstance(owner, nn.MultiheadAttention):
            found[f"{owner_name}.out_proj".lstrip(".")] = "read by nn.MultiheadAttention itself"
        if kind not in reads:
            reads[kind] = _weights_read(kind)
        names = {
            read.name
            for read in reads[kind]
            if all(_answer(test, owner, configs) is not (not wanted) for test, wanted in read.tests)
        }
        if not names:
            continue
        for name, module in owner.named_modules():
            if name.rpartition(".")[2] in names and isinstance(module, nn.Linear):
                full = f"{owner_name}.{name}" if owner_name else name
                found.setdefault(full, f"{kind.__name__} reads it itself")
    return found


def _is_called_plainly(kind: type) -> bool:
    """Whether a Linear of this class computes as `nn.Linear` does."""
    from torch import nn

    return kind.forward is nn.Linear.forward  # type: ignore[attr-defined]


def _weights_read(kind: type) -> tuple[_Read, ...]:
    """The reads of weights while a module of this class computes; none for torch's own classes."""
    reads: list[_Read] = []
    for parent in kind.__mro__:
        if (
            parent.__module__.partition(".")[0] in ("torch", "builtins")
            or parent.__name__ == "PreTrainedModel"
        ):
            continue
        for method_name, method in vars(parent).items():
            function = inspect.unwrap(getattr(method, "__func__", method))
            if inspect.isfunction(function) and not _NOT_COMPUTING.match(method_name):
                reads += _read_in(function)
    return tuple(reads)


@lru_cache(maxsize=16384)
def _read_in(function: Any) -> tuple[_Read, ...]:
    # The compiled code names every attribute: its source is read only where `weight` is among them.
    if "weight" not in _names_in(function.__code__):
        return ()
    try:
        return tuple(_walk(ast.parse(textwrap.dedent(inspect.getsource(function))), ()))
    except (OSError, TypeError, SyntaxError):
        return ()


def _walk(node: ast.AST, tests: tuple[tuple[ast.expr, bool], ...]) -> Iterator[_Read]:
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute):
        yield _Read(node.value.attr, tests)
    branches: list[tuple[list[Any], bool]] = []
    if isinstance(node, ast.If):
        branches = [(node.body, True), (node.orelse, False)]
    elif isinstance(node, ast.IfExp):
        branches = [([node.body], True), ([node.orelse], False)]
    if isinstance(node, ast.If | ast.IfExp):
        yield from _walk(node.test, tests)
        for children, wanted in branches:
            for child in children:
                yield from _walk(child, (*tests, (node.test, wanted)))
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, tests)


def _answer(test: ast.expr, owner: nn.Module, configs: list[Any]) -> bool | None:
    """What a test in a method of ``owner`` gives when a model is used; None where that is not known beforehand.

    Known are ``self.training``, and fields of the config, which may be attributes of the module too.
    """
    match test:
        case ast.BoolOp(op=ast.And(), values=values):
            answers = [_answer(value, owner, configs) for value in values]
            return False if False in answers else None if None in answers else True
        case ast.BoolOp(op=ast.Or(), values=values):
            answers = [_answer(value, owner, configs) for value in values]
            return True if True in answers else None if None in answers else False
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            answer = _answer(operand, owner, configs)
            return None if answer is None else not answer
        case ast.Compare(left=left, ops=[op], comparators=[ast.Constant(value=constant)]):
            known = _field(left, owner, configs)
            if not known or type(op) not in _COMPARISONS:
                return None
            try:
                return bool(_COMPARISONS[type(op)](known[0], constant))
            except TypeError:
                return None
        case _:
            known = _field(test, owner, configs)
            return bool(known[0]) if known else None


def _field(node: ast.expr, owner: nn.Module, configs: list[Any]) -> tuple[Any] | None:
    """The value of ``self.x`` or ``self.config.x`` in a tuple; None for what may change while a model is used."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr="training"):
            return (False,)
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            holder: Any = owner
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr="config"), attr=name):
            holder = getattr(owner, "config", None)
        case _:
            return None
    value = getattr(holder, name, ...)
    plain = value is None or isinstance(value, bool | int | float | str)
    # A module's own attributes may change, such as a flag set by the first call: those named in a config do not.
    return (value,) if plain and any(getattr(config, name, ...) == value for config in configs) else None


def _names_in(code: Any) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= _names_in(constant)
    return names

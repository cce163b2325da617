"""Linear layers whose weight the model's own code reads, instead of calling the layer: they must stay as they are."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import lru_cache
from typing import Any

# These run before a model is evaluated.
_INITIALISERS = ("_init_weights", "reset_parameters", "__init__", "init_weights")


def read_weights(model: Any) -> frozenset[str]:
    """Attribute names, such as ``dt_proj``, whose ``weight`` or ``bias`` is read by the code of the model's modules."""
    files = {type(module).__module__ for module in model.modules()}
    return frozenset().union(*(_reads(name) for name in files if not name.startswith(("torch.", "torchao."))))


@lru_cache(maxsize=64)
def _reads(module: str) -> frozenset[str]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return frozenset()
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef) and node.name in _INITIALISERS:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            found |= {node.value.attr} if node.attr in ("weight", "bias") else set()
        waiting += ast.iter_child_nodes(node)
    return frozenset(found)

"""Fitted objects as a JSON tree and plain tensors. Nothing in either can run code.

The tree names classes, functions and types from an allow list only; an object is its class and its attributes. Arrays
and tensors are taken out of the tree under the path they lie at. Objects and arrays that are reached twice stay one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from importlib import import_module
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loadstone.artifact.context_errors import CorruptContext, UnsafeContent
from loadstone.errors import UsageError

# Key that holds the type of a JSON object; plain dictionaries are written as pairs.
TAG = "#"
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_MAPPINGS: dict[str, Callable[[list[Any]], Any]] = {"dict": dict, "odict": OrderedDict}
_DEVICES = ("cpu", "cuda", "mps", "meta")
_DEEPEST = 200
BaseLookup = Callable[[Tensor], str | None]


class Encoder:
    """Turns objects into trees. ``allowed``: qualified names of the classes, types and functions that may occur.
    ``in_base``: the name under which the base model has a tensor of the same content, which is then only named."""

    def __init__(self, allowed: frozenset[str], in_base: BaseLookup = lambda tensor: None) -> None:
        self.allowed = allowed
        self.in_base = in_base
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, int] = {}
        # An id is reused once its object is gone.
        self._alive: list[Any] = []

    def encode(self, value: Any, path: str) -> Any:
        """The tree of ``value``; raises `UsageError` with the path for an object that is not allowed."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {TAG: "float", "v": repr(value)}
        if kind is list:
            return [self.encode(item, f"{path}.{i}") for i, item in enumerate(value)]
        for name, sequence in _SEQUENCES.items():
            if kind is sequence:
                return {TAG: name, "v": [self.encode(item, f"{path}.{i}") for i, item in enumerate(value)]}
        if kind is dict or kind is OrderedDict:
            return {TAG: "dict" if kind is dict else "odict", "v": self._pairs(value, path)}
        if kind is slice or kind is range:
            return {TAG: kind.__name__, "v": [value.start, value.stop, value.step]}
        if kind is torch.dtype or kind is torch.device:
            return {TAG: kind.__name__, "v": str(value).removeprefix("torch.")}
        if kind is torch.Size:
            return {TAG: "size", "v": list(value)}
        if isinstance(value, np.dtype):
            return {TAG: "npdtype", "v": value.str}
        if isinstance(value, Enum):
            return {TAG: "enum", "c": self._named(kind, path), "v": value.name}
        if isinstance(value, np.generic):
            return {TAG: "scalar", "d": value.dtype.str, "v": self._cell(value, path)}
        if isinstance(value, (type, FunctionType, BuiltinFunctionType, np.ufunc)):
            return {TAG: "named", "v": self._named(value, path)}
        if kind in (np.ndarray, Tensor, torch.nn.Parameter):
            return self._once(value, lambda: self._array(value, path))
        if isinstance(value, (np.random.RandomState, np.random.Generator)):
            return self._once(value, lambda: self._generator(value, path))
        name = self._named(kind, path)
        return self._once(value, lambda: {TAG: "object", "c": name, "v": self._pairs(vars(value), path)})

    def _pairs(self, items: Mapping[Any, Any], path: str) -> list[Any]:
        found = []
        for i, (key, item) in enumerate(items.items()):
            place = key if isinstance(key, int) or (isinstance(key, str) and key.isidentifier()) else i
            found.append([self.encode(key, f"{path}.{i}.key"), self.encode(item, f"{path}.{place}")])
        return found

    def _once(self, value: Any, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        number = self._seen.get(id(value))
        if number is not None:
            return {TAG: "again", "v": number}
        number = self._seen[id(value)] = len(self._alive)
        self._alive.append(value)
        return write() | {"id": number}

    def _array(self, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, np.ndarray):
            name = self.in_base(value)
            if name is not None:
                return {TAG: "base", "v": name}
            return {TAG: "tensor", "v": self._take(value.detach(), path)}
        facts = {TAG: "array", "d": value.dtype.str, "s": list(value.shape)}
        if value.flags.f_contiguous and not value.flags.c_contiguous:
            # Matrix products round differently by memory layout, so it is kept.
            facts["o"] = "F"
        if value.dtype.kind in "OUS":
            flat = value.reshape(-1)
            return facts | {
                "v": [self.encode(_plain(item), f"{path}.{i}") for i, item in enumerate(flat.tolist())]
            }
        if value.dtype.kind in "mM":
            value = value.view(np.int64)
        try:
            tensor = torch.from_numpy(np.array(value, order="C"))
        except TypeError:
            raise UsageError(f"{path} is an array of {value.dtype}, which a context cannot hold") from None
        return facts | {"t": self._take(tensor, path)}

    def _take(self, tensor: Tensor, path: str) -> str:
        name = path
        while name in self.tensors:
            name += "_"
        self.tensors[name] = tensor
        return name

    def _cell(self, value: np.generic, path: str) -> Any:
        if value.dtype.kind in "mM":
            return int(value.view(np.int64))
        return self.encode(value.item(), path)

    def _generator(self, value: Any, path: str) -> dict[str, Any]:
        legacy = isinstance(value, np.random.RandomState)
        state = value.get_state(legacy=False) if legacy else value.bit_generator.state
        return {TAG: "random", "c": type(value).__name__, "v": self.encode(state, path)}

    def _named(self, value: Any, path: str) -> str:
        module = getattr(value, "__module__", None)
        if module is None and isinstance(value, np.ufunc):
            module = "numpy"
        name = f"{module}.{getattr(value, '__qualname__', getattr(value, '__name__', '?'))}"
        if name not in self.allowed:
            raise UsageError(
                f"{path} is a {name}, which a context cannot hold",
                "Leave that option out, or keep this estimator with the package's own save",
            )
        return name


class Decoder:
    """Turns trees back into objects. ``allowed`` as for `Encoder`: nothing else is ever imported. ``tensor`` gives a
    stored tensor by name, ``base`` one of the base model's."""

    def __init__(
        self, allowed: frozenset[str], tensor: Callable[[str], Tensor], base: Callable[[str], Tensor]
    ) -> None:
        self.allowed = allowed
        self.tensor = tensor
        self.base = base
        self._seen: dict[int, Any] = {}

    def decode(self, tree: Any, depth: int = 0) -> Any:
        """The object of ``tree``; raises UnsafeContent for a name that is not allowed, CorruptContext for damage."""
        if depth > _DEEPEST:
            raise CorruptContext("the context's objects are nested too deep", "Do not trust it")
        if tree is None or type(tree) in (bool, int, str, float):
            return tree
        if isinstance(tree, list):
            return [self.decode(item, depth + 1) for item in tree]
        try:
            return self._tagged(tree, depth)
        except (CorruptContext, UnsafeContent):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise CorruptContext(
                f"an object of the context is malformed ({reason})", "Save it again"
            ) from None

    def _tagged(self, tree: dict[str, Any], depth: int) -> Any:
        tag, content = tree[TAG], tree.get("v")
        down = lambda value: self.decode(value, depth + 1)  # noqa: E731
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](down(_list(content)))
        if tag in _MAPPINGS:
            return _MAPPINGS[tag](self._pairs(content, depth))
        if tag == "object":
            return self._object(tree, depth)
        if tag == "again":
            return self._seen[content]  # type: ignore[index]
        if tag in ("array", "tensor", "base", "random"):
            found = self._seen[tree["id"]] = self._array(tree, depth)
            return found
        if tag == "named":
            return self._named(content)
        if tag == "enum":
            kind = self._named(tree["c"])
            if not issubclass(kind, Enum):
                raise CorruptContext(f"{tree['c']} is not an enumeration", "Do not trust it")
            return kind[content]
        if tag == "scalar":
            dtype = np.dtype(tree["d"])
            if dtype.kind in "OV":
                raise CorruptContext("a scalar of no plain kind", "Do not trust it")
            value = down(content)
            return np.int64(value).view(dtype) if dtype.kind in "mM" else np.array(value, dtype)[()]
        return self._simple(tag, content)

    def _simple(self, tag: str, content: Any) -> Any:
        if tag == "float":
            return float(content)
        if tag == "dtype":
            found = getattr(torch, content)
            if not isinstance(found, torch.dtype):
                raise ValueError(f"torch.{content} is not a dtype")
            return found
        if tag == "device" and str(content).partition(":")[0] in _DEVICES:
            return torch.device(content)
        if tag == "npdtype":
            return np.dtype(str(content))
        if tag == "size":
            return torch.Size(content)
        if tag == "slice":
            return slice(*content)
        if tag == "range":
            return range(*content)
        raise ValueError(f"unknown tag {str(tag)[:40]!a}")

    def _object(self, tree: dict[str, Any], depth: int) -> Any:
        kind = self._named(tree["c"])
        if not isinstance(kind, type) or issubclass(kind, Enum):
            raise CorruptContext(f"{tree['c']} is not a class of objects", "Do not trust it")
        # No __init__ and no __setattr__: no code of the class runs here.
        instance = object.__new__(kind)
        self._seen[tree["id"]] = instance
        state = dict(self._pairs(tree["v"], depth))
        if not all(isinstance(key, str) for key in state):
            raise CorruptContext(f"an attribute of {tree['c']} has no name", "Do not trust it")
        instance.__dict__.update(state)
        return instance

    def _pairs(self, content: Any, depth: int) -> list[tuple[Any, Any]]:
        return [(self.decode(k, depth + 1), self.decode(v, depth + 1)) for k, v in _list(content)]

    def _array(self, tree: dict[str, Any], depth: int) -> Any:
        if tree[TAG] == "random":
            return self._generator(tree, depth)
        if tree[TAG] == "base":
            return self.base(tree["v"])
        if tree[TAG] == "tensor":
            return self.tensor(tree["v"])
        dtype, shape = np.dtype(tree["d"]), tuple(tree["s"])
        if "v" in tree:
            if dtype.kind not in "OUS":
                raise ValueError(f"cells of {dtype}")
            flat = np.empty(len(_list(tree["v"])), dtype=dtype)
            for i, item in enumerate(tree["v"]):
                flat[i] = self.decode(item, depth + 1)
            return flat.reshape(shape)
        found = self.tensor(tree["t"]).numpy()
        found = found.view(dtype) if dtype.kind in "mM" else found
        if found.dtype != dtype or found.shape != shape:
            raise ValueError(f"'{tree['t']}' is {found.dtype} {found.shape}, not {dtype} {shape}")
        return np.asfortranarray(found) if tree.get("o") == "F" else found

    def _generator(self, tree: dict[str, Any], depth: int) -> Any:
        state = self.decode(tree["v"], depth + 1)
        kinds = {kind.__name__: kind for kind in (np.random.MT19937, np.random.PCG64, np.random.Philox)}
        bits = kinds[state["bit_generator"]]()
        if tree["c"] == "RandomState":
            legacy = np.random.RandomState(bits)  # type: ignore[arg-type]
            legacy.set_state(state)
            return legacy
        bits.state = state
        return np.random.Generator(bits)  # type: ignore[arg-type]

    def _named(self, name: Any) -> Any:
        if name not in self.allowed:
            raise UnsafeContent(
                f"the context names {str(name)[:100]!a}, which is not allowed in one", "Do not trust it"
            )
        return resolve(name)


def resolve(name: str) -> Any:
    """The object behind a qualified name: a module that exists, then attributes."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("a list was expected")
    return value


def _plain(item: Any) -> Any:
    return item.decode("latin-1") if isinstance(item, bytes) else item

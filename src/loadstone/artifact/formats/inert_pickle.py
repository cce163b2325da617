"""Read what a pickle describes without running it.

A pickle is a program for a small stack machine. This one has no instruction that calls anything: where the
real machine would import a name and call it, this one records name and arguments in a `Node`. Only the
instructions that ``torch.save`` and the standard pickler emit are known; any other one is an error.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

# Each instruction makes at most one object, of about 150 bytes; a state dict has about 30 for a tensor.
MAX_STEPS = 2_000_000


@dataclass(eq=False, slots=True)
class Global:
    """An imported name, not imported: ``torch.bfloat16``."""

    path: str


@dataclass(eq=False, slots=True)
class Node:
    """What the pickle would build: ``path(*args)``, its ``state`` (BUILD), items set on it or appended."""

    path: str
    args: Any = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    _pairs: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def pairs(self) -> dict[str, Any]:
        """The items with string keys, as a dict (a later one wins); computed once, since many may share one node."""
        if self._pairs is None:
            # Other keys are left out: chosen to collide, a million of them would take hours to hash.
            named = (i for i in self.items if type(i) is tuple and len(i) == 2 and type(i[0]) is str)
            self._pairs = dict(named)
        return self._pairs

    def attribute(self, name: str) -> Any:
        """One attribute out of ``state``, None when there is none."""
        return self.state.pairs().get(name) if isinstance(self.state, Node) else None


class MalformedPickle(ValueError):
    """The bytes are not a pickle that this machine can follow."""


def read_pickle(data: bytes, max_steps: int = MAX_STEPS) -> tuple[Any, frozenset[str]]:
    """What a pickle describes, and every global it names; raises `MalformedPickle`, whatever the bytes are.

    Dicts, ordered dicts and sets come back as `Node` with ``items``; tuples, lists and scalars as themselves.
    """
    machine = _Machine(max_steps // 4)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > max_steps:
                raise ValueError(f"it has over {max_steps:,} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop(), frozenset(machine.names)
            machine.step(opcode.name, argument)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise MalformedPickle(str(error)) from None
    raise MalformedPickle("it does not end")


# In bits: no size or offset has more, and long integers take hours to print.
_MAX_INTEGER = 128
_LITERALS = frozenset(
    [
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "LONG4",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    def __init__(self, most: int) -> None:
        # Containers and names that it may still make: they cost many times what other instructions do.
        self.left = most
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()

    def step(self, op: str, argument: Any) -> None:
        if op in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER:
                raise ValueError("an integer of over 128 bits")
            self.stack.append(argument)
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif op in _CONSTANTS:
            self.stack.append(_CONSTANTS[op])
        elif op in _TUPLES:
            count = _TUPLES[op]
            if len(self.stack) < count:
                raise IndexError("stack underflow")
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif op == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif op == "TUPLE":
            values = tuple(self._to_mark())
            self.stack.append(values)
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            self._global(op, argument)
        elif op in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            self._call(keywords=op == "NEWOBJ_EX")
        else:
            self._container(op)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError("it makes too many containers and names")

    def _container(self, op: str) -> None:
        stack = self.stack
        if op.startswith("EMPTY"):
            self._count()
        if op == "EMPTY_LIST":
            stack.append([])
        elif op == "EMPTY_DICT":
            stack.append(Node("dict"))
        elif op == "EMPTY_SET":
            stack.append(Node("set"))
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1].items.append((key, value))
        elif op == "SETITEMS":
            flat = self._to_mark()
            self.stack[-1].items.extend(zip(flat[::2], flat[1::2], strict=True))
        elif op == "APPEND":
            value = stack.pop()
            self._items().append(value)
        elif op in ("APPENDS", "ADDITEMS"):
            values = self._to_mark()
            self._items().extend(values)
        elif op == "FROZENSET":
            values = self._to_mark()
            self.stack.append(Node("frozenset", (), None, values))
        elif op == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif op == "BINPERSID":
            stack.append(Node("persistent", stack.pop()))
        elif op == "POP":
            stack.pop()
        elif op not in ("PROTO", "FRAME"):
            raise ValueError(f"instruction {op}")

    def _items(self) -> list[Any]:
        target = self.stack[-1]
        return target if isinstance(target, list) else target.items

    def _to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def _global(self, op: str, argument: Any) -> None:
        self._count()
        if op == "GLOBAL":
            module, _, name = argument.partition(" ")
        else:
            name, module = self.stack.pop(), self.stack.pop()
            # Nested tuples in their place would take for ever to format.
            if type(name) is not str or type(module) is not str:
                raise ValueError("a name that is no string")
        # Protocol 2, which torch.save uses, spells builtins as Python 2 did.
        path = f"builtins.{name}" if module == "__builtin__" else f"{module}.{name}"
        self.names.add(path)
        self.stack.append(Global(path))

    def _call(self, keywords: bool) -> None:
        if keywords:
            self.stack.pop()
        arguments, function = self.stack.pop(), self.stack.pop()
        # A call of something that was itself computed has no name to record.
        path = function.path if isinstance(function, Global) else "?"
        self.stack.append(Node(path, arguments))

"""The order of packages that docs/contributing.md shows, held by reading the import statements of src/."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
# A room imports from itself and from those before it.
ROOMS = (
    "errors",
    "_version",
    "ranks",
    "progress",
    "artifact",
    "quantization",
    "loading",
    "writing",
    "text",
    "finalization",
    "fakequant",
    "context",
    "evaluation",
    "cli",
)
HEAVY = {"torch", "torchao", "transformers", "datasets", "accelerate", "numpy", "safetensors", "pandas"}
MAX_LINES = 500
# Tables that give public names and commands their modules, resolved on first use.
LAZY_TABLES = {"loadstone", "loadstone.context", "loadstone.fakequant", "loadstone.cli.app"}

# What is left to mend: each entry goes with the change that mends it.
KNOWN_ROOMS: set[str] = set()
KNOWN_ARROWS: set[tuple[str, str]] = set()
KNOWN_CIRCLES: list[set[str]] = []
KNOWN_STRINGS: set[tuple[str, str]] = set()
KNOWN_HEAVY: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Import:
    """One imported module: ``at_start`` when importing the file imports it, rather than a call or a type checker."""

    module: str
    line: int
    at_start: bool


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    found = {}
    for path in sorted((SRC / "loadstone").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> tuple[Import, ...]:
    return tuple(_imports(tree(module).body, at_start=True))


def _imports(body: list[ast.stmt], *, at_start: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_start)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(inner if inner in modules() else node.module, node.lineno, at_start)
        else:
            inside = at_start and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                inside = False
            for name in ("body", "orelse", "finalbody", "handlers", "cases"):
                for child in getattr(node, name, ()):
                    nested = child.body if isinstance(child, ast.ExceptHandler | ast.match_case) else [child]
                    yield from _imports(nested, at_start=inside)


def room(module: str) -> str:
    return module.split(".")[1]


def own_imports(module: str) -> set[str]:
    return {i.module for i in imports(module) if i.module.split(".")[0] == "loadstone"} - {module}


def test_every_room_has_its_place() -> None:
    assert {room(m) for m in modules() if "." in m} - KNOWN_ROOMS == {*ROOMS, "__main__"}


def test_imports_point_one_way() -> None:
    found = {
        (module, target)
        for module in modules()
        if "." in module and module != "loadstone.__main__"
        for target in own_imports(module)
        if not KNOWN_ROOMS & {room(module), room(f"{target}.")}
        if target == "loadstone" or ROOMS.index(room(target)) > ROOMS.index(room(module))
    }
    assert found <= KNOWN_ARROWS


def test_no_circle_of_modules() -> None:
    circles = [group for group in _groups() if len(group) > 1]
    assert [group for group in circles if not any(group <= known for known in KNOWN_CIRCLES)] == []


def _groups() -> list[set[str]]:
    """Sets of modules that reach each other through their imports (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(own_imports(module)):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            cut = stack.index(module)
            found.append(set(stack[cut:]))
            del stack[cut:]

    for module in modules():
        if module not in index and module != "loadstone":
            visit(module)
    return found


def test_no_heavy_import_where_commands_start() -> None:
    found = {
        (module, imported.module.split(".")[0])
        for module in modules()
        if module == "loadstone" or room(module) in ("cli", "artifact")
        for imported in imports(module)
        # The command line leaves torch to the library: not even a function of it imports torch.
        if imported.module.split(".")[0] in HEAVY and (imported.at_start or room(f"{module}.") == "cli")
    }
    assert found <= KNOWN_HEAVY


def test_no_string_stands_for_an_import() -> None:
    found = {
        (module, text)
        for module in modules()
        if module not in LAZY_TABLES
        for text in _module_names_in_strings(tree(module))
    }
    assert found <= KNOWN_STRINGS


def _module_names_in_strings(root: ast.AST) -> Iterator[str]:
    for node in ast.walk(root):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
            # A logger's name is no import.
            for argument in node.args:
                argument._seen = True  # type: ignore[attr-defined]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not hasattr(node, "_seen"):
            if node.value in modules() and "." in node.value:
                yield node.value
            elif node.value.startswith("loadstone.") and node.value.endswith("."):
                yield node.value  # The start of an f-string that a name is put behind.


def test_modules_are_short() -> None:
    lengths = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in modules().items()}
    assert {m: n for m, n in lengths.items() if n > MAX_LINES} == {}


def test_the_top_level_holds_these_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=SRC.parent, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == {
        "pyproject.toml", "src", "tests", "recipes", "docs", "Makefile", "README.md", "LICENSE",
    }  # fmt: skip
    assert {name for name in names if name.startswith(".")} <= {".ci", ".gitignore"}


def test_the_docs_show_this_order() -> None:
    page = (SRC.parent / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(ROOMS)

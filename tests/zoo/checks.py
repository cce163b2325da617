"""What is tried on each model: one function for each column of the table.

A check gets a `Case` and returns a `Result`: right, refused with the command's reason, not applicable, or a fault.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.zoo.eval_checks import columns
from tests.zoo.process import Process

# Largest relative distance of a weight to the original: well above each format's rounding, well below a wrong scale.
LIMITS = {"int8-weight-only": 0.03, "intx4-weight-only": 0.3, "float8-weight-only": 0.08, "nvfp4": 0.3}


@dataclass(frozen=True)
class Result:
    """``status``: right, refused, none (nothing to check) or the kind of fault."""

    status: str
    detail: str = ""


@dataclass
class Case:
    """One model of the zoo on disk and the two processes that load it."""

    model_type: str
    path: Path
    facts: dict[str, Any]
    stock: Process
    loadstone: Process
    original: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.path / "model"

    def observe(self, process: Process, path: Path, **options: Any) -> dict[str, Any]:
        return process.ask(
            "observe",
            path=str(path),
            class_name=self.facts["class"],
            inputs=str(self.path / "inputs.pt"),
            **options,
        )

    def artifact(self, name: str) -> Path:
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def command(case: Case, *arguments: object) -> Result | None:
    """Run a command; a result where it did not succeed."""
    answer = case.loadstone.ask("command", arguments=[str(a) for a in arguments])
    if "ok" not in answer:
        return Result("crash", answer.get("error") or answer["crash"])
    code, text = answer["ok"]["code"], answer["ok"]["text"].replace(str(case.path), "")
    if code in (2, 3, 5):
        return Result("refused", f"exit {code}: {text}")
    return Result("exit 1", f"exit {code}: {text}") if code else None


def both(case: Case, path: Path, compare: bool = False) -> tuple[dict[str, Any], dict[str, Any]] | Result:
    """What both processes report of an artifact, or the fault of the one that does not load it."""
    seen = []
    for name, process in (("stock", case.stock), ("loadstone", case.loadstone)):
        answer = case.observe(process, path, compare=compare and name == "stock")
        if "ok" not in answer:
            return Result(f"{name} reload", answer.get("error") or answer["crash"])
        seen.append(answer["ok"])
    return seen[0], seen[1]


def same_values(ours: dict[str, Any], theirs: dict[str, Any]) -> Result | None:
    """A fault where loadstone's model has other modules, tensors or outputs than stock's."""
    if ours["modules"] != theirs["modules"]:
        return Result("modules", _difference(ours["modules"], theirs["modules"]))
    if ours["state"] != theirs["state"]:
        return Result("wrong tensors", _difference(ours["state"], theirs["state"]))
    if ours.get("forward_error") != theirs.get("forward_error"):
        return Result(
            "forward", f"loadstone: {ours.get('forward_error')}; stock: {theirs.get('forward_error')}"
        )
    if ours.get("outputs") != theirs.get("outputs"):
        return Result("wrong numbers", "outputs of one forward pass differ")
    return None


def same_attributes(ours: dict[str, Any], theirs: dict[str, Any]) -> Result | None:
    """A fault where the model objects differ in what they carry beside modules and tensors."""
    if ours["attributes"] == theirs["attributes"]:
        return None
    return Result("attributes", _difference(ours["attributes"], theirs["attributes"]))


def _difference(ours: Any, theirs: Any, path: str = "") -> str:
    """The first three places where two values differ, ours first."""
    found: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted({*a, *b}, key=str):
                walk(a.get(key, "absent"), b.get(key, "absent"), f"{path}.{key}" if path else str(key))
        elif isinstance(a, list) and isinstance(b, list):
            if a != b:
                only = [x for x in a if x not in b], [x for x in b if x not in a]
                found.append(f"{path}: only ours {only[0][:4]}, only stock's {only[1][:4]}")
        elif a != b:
            found.append(f"{path}: {str(a)[:80]} / {str(b)[:80]}")

    walk(ours, theirs, path)
    return f"{len(found)} differ: " + "; ".join(found[:3])


def load(case: Case) -> Result:
    """`loadstone.load` of the original gives the model that stock gives."""
    answer = case.observe(case.loadstone, case.model)
    if "ok" not in answer:
        status = "refused" if answer.get("refused") else "loadstone load"
        return Result(status, answer.get("error") or answer["crash"])
    ours = answer["ok"]
    return same_values(ours, case.original) or same_attributes(ours, case.original) or Result("right")


def finalize(recipe: str) -> Callable[[Case], Result]:
    """Finalize (plain where `recipe` is empty); stock and loadstone load the artifact and agree with the source."""

    def check(case: Case) -> Result:
        out = case.artifact(recipe or "plain")
        options = ["--quantize", recipe] if recipe else []
        failed = command(case, "-q", "finalize", "-M", case.model, *options, "-o", out)
        return failed or loads(case, out, recipe)

    return check


def export(number_format: str) -> Callable[[Case], Result]:
    """export-fakequant; its output loads as a plain model in both."""

    def check(case: Case) -> Result:
        out = case.artifact("export")
        failed = command(
            case, "-q", "export-fakequant", "-M", case.model, "--format", number_format, "-o", out
        )
        return failed or loads(case, out, number_format)

    return check


def loads(case: Case, out: Path, rounding: str) -> Result:
    """Both processes load the artifact, agree, and its values are the original's up to the rounding."""
    seen = both(case, out, compare=True)
    if isinstance(seen, Result):
        return seen
    stock, ours = seen
    if stock["info"] != case.original["info"]:
        said = "; ".join(f"{key} ({len(names)}): {names[0]}" for key, names in stock["info"].items())
        return Result("stock reload", f"stock reports {said}")
    fault = same_values(ours, stock) or (
        _rounded(stock, case, rounding) if rounding else _same(stock, case.original)
    )
    changed = stock["quantized"] or len(stock["distances"])
    return (
        fault
        or same_attributes(ours, stock)
        or Result("right", f"{changed} tensors changed" if rounding else "")
    )


def _rounded(artifact: dict[str, Any], case: Case, rounding: str) -> Result | None:
    """Each tensor is the original's up to the rounding, and the model computes where the original does."""
    far = {name: off for name, off in artifact["distances"].items() if not 0 <= off <= LIMITS[rounding]}
    if far:
        return Result("wrong weights", f"{len(far)} far from the original: {dict(list(far.items())[:3])}")
    if "outputs" in case.original and "outputs" not in artifact:
        return Result("forward", f"the artifact does not compute: {artifact.get('forward_error')}")
    return None


def _same(artifact: dict[str, Any], original: dict[str, Any]) -> Result | None:
    """A plain artifact is the original, bit for bit."""
    for key, status in (("state", "wrong tensors"), ("outputs", "wrong numbers")):
        if artifact.get(key) != original.get(key):
            return Result(status, _difference(artifact.get(key), original.get(key)))
    return None


def evaluation(column: str) -> Callable[[Case], Result]:
    """A column of eval against the plain loop."""

    def check(case: Case) -> Result:
        answer = case.loadstone.ask(
            "evaluate", path=str(case.model), class_name=case.facts["class"], column=column
        )
        if "ok" not in answer:
            return Result("crash", answer.get("error") or answer["crash"])
        return Result(answer["ok"]["status"], answer["ok"]["detail"].replace(str(case.path), ""))

    return check


# Eval's columns come last: they put a tokenizer into the model's directory.
CHECKS: dict[str, Callable[[Case], Result]] = {
    "load": load,
    "plain": finalize(""),
    "int8-weight-only": finalize("int8-weight-only"),
    "intx4-weight-only": finalize("intx4-weight-only"),
    "float8-weight-only": finalize("float8-weight-only"),
    "export nvfp4": export("nvfp4"),
    **{column: evaluation(column) for column in columns},
}

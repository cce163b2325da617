"""Number formats as data: what a weight is rounded to, and what its layer's input is rounded to. No
torch here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from loadstone.errors import UsageError
from loadstone.quantization.schemes import RECIPES, Recipe, parse_recipe


@dataclass(frozen=True)
class Integer:
    """Symmetric integers, one scale a row, or a block of ``block`` values of a row (a last partial one
    is padded)."""

    bits: Literal[4, 8]
    block: int = 0


@dataclass(frozen=True)
class Float8:
    """e4m3 with one float32 scale a tensor, a row, or a square of ``block`` x ``block`` (partial ones
    are padded)."""

    granularity: Literal["tensor", "row", "block"] = "tensor"
    block: int = 128


@dataclass(frozen=True)
class Nvfp4:
    """e2m1 in blocks of 16 with e4m3 scales and one float32 scale a tensor."""


@dataclass(frozen=True)
class Mx:
    """OCP microscaling: e2m1 (4 bits) or e4m3 (8 bits) in blocks of 32 with power-of-two scales."""

    bits: Literal[4, 8]


@dataclass(frozen=True)
class Staged:
    """Formats applied one after the other, each with scales of the weight as it was before the first."""

    stages: tuple[Integer | Float8 | Nvfp4 | Mx, ...]


@dataclass(frozen=True)
class Own:
    """What the model's own quantizer, of the class ``quantizer``, makes of the weight; done as the model
    is read."""

    quantizer: str


WeightSpec = Integer | Float8 | Nvfp4 | Mx | Staged | Own | Recipe

# How a layer's input is rounded. Those that need an ``amax`` (one value a layer) get it by calibration.
InputSpec = Literal["int8", "fp8", "fp8-token", "nvfp4", "mxfp8", "mxfp4"]
CALIBRATED = frozenset({"int8", "fp8", "nvfp4"})


@dataclass(frozen=True)
class Format:
    """A named choice for a weight and its layer's input (None: left as it is). ``text`` parses back to it."""

    name: str
    weight: WeightSpec
    inputs: InputSpec | None = None
    text: str = ""

    @property
    def needs_calibration(self) -> bool:
        """Whether the input quantizer has an ``amax`` that only running the model tells."""
        return self.inputs in CALIBRATED

    def __str__(self) -> str:
        return self.text or self.name


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp8", Float8("tensor"), "fp8"),
        Format("int8", Integer(8), "int8"),
        Format("int4", Integer(4, 128)),
        Format("nvfp4", Nvfp4(), "nvfp4"),
        Format("mxfp8", Mx(8), "mxfp8"),
        Format("mxfp4", Mx(4), "mxfp4"),
        Format("w4a8", Staged((Integer(4, 128), Float8("tensor"))), "fp8"),
    )
}
_FP8_INPUTS: dict[str, InputSpec | None] = {"tensor": "fp8", "row": "fp8-token", "block": None}


def parse_format(text: str) -> Format:
    """``NAME``, ``NAME:option=value,…`` or a torchao recipe as a format; `UsageError` names what is near."""
    name, _, options = text.strip().partition(":")
    if name in RECIPES:
        recipe = parse_recipe(text)
        return Format(name, recipe, None, str(recipe))
    if name not in FORMATS:
        known = [*FORMATS, *RECIPES]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"Did you mean '{close[0]}'? " if close else ""
        raise UsageError(
            f"unknown format '{name}'", f"{hint}One of {', '.join(FORMATS)}, or a torchao recipe"
        )
    found = FORMATS[name]
    for option in filter(None, options.split(",")):
        key, _, value = option.strip().partition("=")
        found = _with_option(found, key.replace("-", "_"), value)
    return replace(found, text=f"{name}:{options}" if options else name)


def _with_option(found: Format, key: str, value: str) -> Format:
    spec: Any = found.weight
    hints = get_type_hints(type(spec))
    allowed = {"int4": ("block",), "fp8": ("granularity", "block")}.get(found.name, ())
    if key not in allowed or key not in {f.name for f in fields(spec)}:
        raise UsageError(
            f"format '{found.name}' has no option '{key}'", f"Its options: {', '.join(allowed) or 'none'}"
        )
    if hints[key] is int:
        if not value.isdecimal() or not 8 <= int(value) <= 2**16:
            raise UsageError(f"format '{found.name}': {key}='{value}' is no block size", "Example: block=128")
        return replace(found, weight=replace(spec, **{key: int(value)}))
    choices = get_args(hints[key])
    if value not in choices:
        raise UsageError(
            f"format '{found.name}': {key}='{value}' is not possible", f"One of {', '.join(choices)}"
        )
    return replace(found, weight=replace(spec, **{key: value}), inputs=_FP8_INPUTS[value])


def misfit(spec: WeightSpec, shape: tuple[int, ...]) -> str:
    """Why a weight of ``shape`` (…, out, in) cannot take ``spec``; empty when it can."""
    width = shape[-1]
    match spec:
        case Nvfp4() if width % 16:
            return f"its width {width} is no multiple of 16, which NVFP4 does not pad"
        case Mx(bits=4) if width % 32:
            return f"its width {width} is no multiple of 32, which MXFP4 does not pad"
        case Staged(stages=stages):
            return next((text for stage in stages if (text := misfit(stage, shape))), "")
        case Recipe(scheme=scheme):
            return scheme.misfit(*shape[-2:]).replace("shape", "its shape")
    return ""


def scaled_by_tensor(spec: WeightSpec) -> bool:
    """Whether rows are folded by the largest magnitude of the whole weight."""
    match spec:
        case Float8(granularity="tensor") | Nvfp4():
            return True
        case Staged(stages=stages):
            return any(scaled_by_tensor(stage) for stage in stages)
    return False

"""Number formats: what a weight is rounded to, and what its layer's input is rounded to.

A format is a frozen dataclass here with its entry in `FORMATS`, and its arithmetic in a file beside this one, which is
imported when it is used: no torch before that. Of each dataclass:

- ``scaled_by_tensor``: one scale follows from ``amax``, the largest magnitude of the whole tensor;
- ``calibrated``: values are chosen by the text that a model reads (of torchao's schemes some are);
- ``row_multiple``: rows are independent otherwise, in blocks of any multiple of this number;
- ``misfit(width)``: why a weight of that many inputs cannot take it, empty when it can;
- ``fold(x, amax)``: float32 ``x`` (…, in) quantized and dequantized; ``amax`` is a float32 scalar tensor.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from loadstone.errors import UsageError
from loadstone.quantization.schemes import RECIPES, Recipe, parse_recipe

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Integer:
    """Symmetric integers with one scale for each row, or for each ``block`` values of a row (a last partial block is
    padded)."""

    bits: Literal[4, 8]
    block: int = 0
    scaled_by_tensor = False
    row_multiple = 1
    calibrated = False

    def misfit(self, width: int) -> str:
        return ""

    def fold(self, x: Tensor, amax: Tensor) -> Tensor:
        from loadstone.fakequant.formats.integer import fold_rows

        return fold_rows(x, self.bits, self.block)


@dataclass(frozen=True)
class Int8Tensor:
    """Symmetric int8 with one scale for the whole tensor."""

    scaled_by_tensor = True
    row_multiple = 1
    calibrated = False

    def misfit(self, width: int) -> str:
        return ""

    def fold(self, x: Tensor, amax: Tensor) -> Tensor:
        from loadstone.fakequant.formats.integer import fold_blocks

        return fold_blocks(x, 8, amax)


@dataclass(frozen=True)
class Float8:
    """e4m3 with one float32 scale for the tensor, each row, or each square of ``block`` x ``block`` (partial squares
    are padded)."""

    granularity: Literal["tensor", "row", "block"] = "tensor"
    block: int = 128
    calibrated = False

    @property
    def scaled_by_tensor(self) -> bool:
        return self.granularity == "tensor"

    @property
    def row_multiple(self) -> int:
        return self.block if self.granularity == "block" else 1

    def misfit(self, width: int) -> str:
        return ""

    def fold(self, x: Tensor, amax: Tensor) -> Tensor:
        from loadstone.fakequant.formats import float8

        if self.granularity == "tensor":
            return float8.fold_scaled(x, amax)
        return float8.fold_rows(x) if self.granularity == "row" else float8.fold_squares(x, self.block)


@dataclass(frozen=True)
class Nvfp4:
    """e2m1 in blocks of 16 with e4m3 scales and one float32 scale for the tensor."""

    scaled_by_tensor = True
    row_multiple = 1
    calibrated = False

    def misfit(self, width: int) -> str:
        return f"its width {width} is no multiple of 16, which NVFP4 does not pad" if width % 16 else ""

    def fold(self, x: Tensor, amax: Tensor) -> Tensor:
        from loadstone.fakequant.formats.fp4 import fold_nvfp4

        return fold_nvfp4(x, amax)


@dataclass(frozen=True)
class Mx:
    """OCP microscaling: e2m1 (4 bits) or e4m3 (8 bits) in blocks of 32 with power-of-two scales."""

    bits: Literal[4, 8]
    scaled_by_tensor = False
    row_multiple = 1
    calibrated = False

    def misfit(self, width: int) -> str:
        if self.bits == 8 or width % 32 == 0:
            return ""
        return f"its width {width} is no multiple of 32, which MXFP4 does not pad"

    def fold(self, x: Tensor, amax: Tensor) -> Tensor:
        from loadstone.fakequant.formats.fp4 import fold_mxfp4, fold_mxfp8

        return fold_mxfp4(x) if self.bits == 4 else fold_mxfp8(x)


@dataclass(frozen=True)
class Staged:
    """Formats applied one after the other, each with the ``amax`` of the weight as it was before the first."""

    stages: tuple[Integer | Float8 | Nvfp4 | Mx, ...]
    calibrated = False

    @property
    def scaled_by_tensor(self) -> bool:
        return any(stage.scaled_by_tensor for stage in self.stages)

    @property
    def row_multiple(self) -> int:
        return lcm(*(stage.row_multiple for stage in self.stages))

    def misfit(self, width: int) -> str:
        return next((text for stage in self.stages if (text := stage.misfit(width))), "")

    def fold(self, x: Tensor, amax: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage.fold(x, amax)
        return x


@dataclass(frozen=True)
class Own:
    """The rounding of the model's own quantizer, of the class ``quantizer``, which runs while the model is read."""

    quantizer: str


WeightSpec = Integer | Float8 | Nvfp4 | Mx | Staged | Own | Recipe

# How a layer's input is rounded, by name.
INPUTS: dict[str, Int8Tensor | Float8 | Nvfp4 | Mx] = {
    "int8": Int8Tensor(),
    "fp8": Float8("tensor"),
    "fp8-token": Float8("row"),
    "nvfp4": Nvfp4(),
    "mxfp8": Mx(8),
    "mxfp4": Mx(4),
}
# Those that need an ``amax`` (one value for each layer), which calibration measures.
CALIBRATED = frozenset(name for name, spec in INPUTS.items() if spec.scaled_by_tensor)


@dataclass(frozen=True)
class Format:
    """A named choice for a weight and its layer's input (a name in `INPUTS`; None: left as it is). ``text`` parses back
    to it; ``options``: fields of ``weight`` that a user may set."""

    name: str
    weight: WeightSpec
    inputs: str | None = None
    text: str = ""
    options: tuple[str, ...] = ()

    @property
    def needs_calibration(self) -> bool:
        """Whether the input quantizer has an ``amax``, which takes running the model."""
        return self.inputs in CALIBRATED

    def __str__(self) -> str:
        return self.text or self.name


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp8", Float8("tensor"), "fp8", options=("granularity", "block")),
        Format("int8", Integer(8), "int8"),
        Format("int4", Integer(4, 128), options=("block",)),
        Format("nvfp4", Nvfp4(), "nvfp4"),
        Format("mxfp8", Mx(8), "mxfp8"),
        Format("mxfp4", Mx(4), "mxfp4"),
        Format("w4a8", Staged((Integer(4, 128), Float8("tensor"))), "fp8"),
    )
}
_FP8_INPUTS: dict[str, str | None] = {"tensor": "fp8", "row": "fp8-token", "block": None}


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
    if key not in found.options:
        raise UsageError(
            f"format '{found.name}' has no option '{key}'",
            f"Its options: {', '.join(found.options) or 'none'}",
        )
    if hints[key] is int:
        if not value.isdecimal() or not 8 <= int(value) <= 2**16:
            raise UsageError(
                f"format '{found.name}': {key}='{value}' is not a block size", "Example: block=128"
            )
        return replace(found, weight=replace(spec, **{key: int(value)}))
    choices = get_args(hints[key])
    if value not in choices:
        raise UsageError(
            f"format '{found.name}': {key}='{value}' is not possible", f"One of {', '.join(choices)}"
        )
    return replace(found, weight=replace(spec, **{key: value}), inputs=_FP8_INPUTS[value])


def misfit(spec: WeightSpec, shape: tuple[int, ...]) -> str:
    """Why a weight of ``shape`` (…, out, in) cannot take ``spec``; empty when it can."""
    if isinstance(spec, Own):
        return ""
    if isinstance(spec, Recipe):
        return spec.scheme.misfit(*shape[-2:]).replace("shape", "its shape")
    return spec.misfit(shape[-1])

"""Quantization schemes: frozen dataclasses with their options, and the table of named recipes. No torch here.

A scheme says how one weight is stored and multiplied; a recipe is a scheme with a name. ``torchao_config.py`` turns
schemes into torchao configs and tensors back into schemes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Literal, get_type_hints

from loadstone.errors import UsageError

Mapping = Literal["symmetric", "asymmetric"]
Granularity = Literal["row", "tensor"]
Rounding = Literal["affine", "mse", "hqq", "gptq", "awq"]
# These need text: `finalize --calibrate`. The others look at the weight alone.
CALIBRATED = ("gptq", "awq", "smoothquant")


@dataclass(frozen=True)
class Int8DynActIntxWeight:
    """int8 dynamic activations (asymmetric, per token), intx weights in groups (``group_size`` 0: per row)."""

    bits: int = 4
    group_size: int = 32
    mapping: Mapping = "symmetric"
    rounding: Literal["affine", "mse", "hqq", "gptq", "awq", "smoothquant"] = "affine"


@dataclass(frozen=True)
class IntxWeightOnly:
    """intx weights in groups (``group_size`` 0: per row), one int8 per value on disk."""

    bits: int = 4
    group_size: int = 32
    mapping: Mapping = "symmetric"
    rounding: Rounding = "affine"


@dataclass(frozen=True)
class Int8DynActInt8Weight:
    """int8 dynamic activations (per token or per tensor), int8 weights of the same granularity."""

    granularity: Granularity = "row"
    act_mapping: Mapping = "symmetric"
    rounding: Literal["affine", "smoothquant"] = "affine"


@dataclass(frozen=True)
class Int8WeightOnly:
    """int8 weights, symmetric."""

    granularity: Granularity = "row"
    rounding: Literal["affine", "awq"] = "affine"


@dataclass(frozen=True)
class Int4WeightOnly:
    """uint4 weights in groups, packed for the tinygemm CUDA kernel (tile_packed_to_4d)."""

    group_size: Literal[32, 64, 128, 256] = 128
    rounding: Literal["tinygemm", "hqq", "awq"] = "tinygemm"


@dataclass(frozen=True)
class Float8WeightOnly:
    """float8 e4m3 weights with float32 scales."""

    granularity: Granularity = "row"


@dataclass(frozen=True)
class Float8DynActFloat8Weight:
    """float8 e4m3 dynamic activations and weights."""

    granularity: Granularity = "row"


@dataclass(frozen=True)
class Float8DynActInt4Weight:
    """float8 e4m3 dynamic activations per row, int4 weights in groups of 128 (preshuffled)."""


@dataclass(frozen=True)
class Nvfp4WeightOnly:
    """NVFP4 weights: e2m1 in blocks of 16 with e4m3 scales and one float32 scale per tensor."""


@dataclass(frozen=True)
class Nvfp4DynActNvfp4Weight:
    """NVFP4 dynamic activations and weights."""


@dataclass(frozen=True)
class MxDynActMxWeight:
    """OCP microscaling activations and weights in blocks of 32 with e8m0 scales, products computed by emulation."""

    bits: Literal[4, 8] = 4


Scheme = (
    Int8DynActIntxWeight
    | IntxWeightOnly
    | Int8DynActInt8Weight
    | Int8WeightOnly
    | Int4WeightOnly
    | Float8WeightOnly
    | Float8DynActFloat8Weight
    | Float8DynActInt4Weight
    | Nvfp4WeightOnly
    | Nvfp4DynActNvfp4Weight
    | MxDynActMxWeight
)


@dataclass(frozen=True)
class Recipe:
    """A named scheme. ``devices``: where it quantizes and runs; ``needs``: what else it takes; ``instead``: where
    it cannot run, the nearest recipe that can."""

    name: str
    scheme: Scheme
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: str = ""
    instead: str = ""

    @property
    def nominal_bits(self) -> float:
        """Bits per weight of the number format alone."""
        return nominal_bits(self.scheme)

    def stored_bits(self, in_features: int = 4096, out_features: int = 4096, scale_bits: int = 16) -> float:
        """Bits per weight that torchao stores, scales and zero points included, for a weight of this shape."""
        return stored_bits(self.scheme, in_features, out_features, scale_bits)

    def __str__(self) -> str:
        return spell(self)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8-dynamic-act-int4-weight", Int8DynActIntxWeight(bits=4)),
        Recipe("int8-dynamic-act-intx-weight", Int8DynActIntxWeight(bits=8)),
        Recipe("int8-dynamic-act-int8-weight", Int8DynActInt8Weight()),
        Recipe("int8-weight-only", Int8WeightOnly()),
        Recipe("int4-weight-only", Int4WeightOnly(), ("cuda",), "a CUDA GPU", "intx4-weight-only"),
        Recipe("intx4-weight-only", IntxWeightOnly(bits=4)),
        Recipe("intx3-weight-only", IntxWeightOnly(bits=3)),
        Recipe("intx2-weight-only", IntxWeightOnly(bits=2)),
        Recipe("float8-weight-only", Float8WeightOnly()),
        Recipe(
            "float8-dynamic-act-float8-weight",
            Float8DynActFloat8Weight(),
            ("cuda",),
            "a CUDA GPU of compute capability 8.9 or later",
            "float8-weight-only",
        ),
        Recipe(
            "float8-dynamic-act-int4-weight",
            Float8DynActInt4Weight(),
            ("cuda",),
            "a Hopper GPU and the package mslk>=1.0.0; torchao cannot write its tensors to safetensors",
            "int4-weight-only",
        ),
        Recipe("nvfp4-weight-only", Nvfp4WeightOnly()),
        Recipe(
            "nvfp4-dynamic-act-nvfp4-weight",
            Nvfp4DynActNvfp4Weight(),
            ("cuda",),
            "a Blackwell GPU (compute capability 10.0)",
            "nvfp4-weight-only",
        ),
        Recipe("mxfp4-dynamic-act-mxfp4-weight", MxDynActMxWeight(bits=4)),
        Recipe("mxfp8-dynamic-act-mxfp8-weight", MxDynActMxWeight(bits=8)),
    )
}


def parse_recipe(text: str) -> Recipe:
    """``NAME`` or ``NAME:option=value,…`` as a recipe; raises `UsageError` naming what is unknown and what is near."""
    name, _, options = text.strip().partition(":")
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"Did you mean '{close[0]}'? " if close else ""
        raise UsageError(f"unknown recipe '{name}'", f"{hint}`loadstone finalize --list-recipes` shows all")
    recipe = RECIPES[name]
    if not options:
        return recipe
    hints = get_type_hints(type(recipe.scheme))
    changes: dict[str, object] = {}
    for option in options.split(","):
        key, _, value = option.strip().partition("=")
        key = key.replace("-", "_")
        if key not in hints:
            known = ", ".join(hints) or "none"
            raise UsageError(f"recipe '{name}' has no option '{key}'", f"Its options: {known}")
        changes[key] = _option(name, key, value, hints[key])
    return _possible(replace(recipe, scheme=replace(recipe.scheme, **changes)))  # type: ignore[type-var, arg-type]


def rounding_choices(scheme: Scheme) -> tuple[str, ...]:
    """The ways of rounding that a scheme can take, the plain one first; empty when it has no choice."""
    hint = get_type_hints(type(scheme)).get("rounding")
    return tuple(hint.__args__) if hint else ()


def rounding_of(scheme: Scheme | None) -> str:
    """How a scheme rounds, empty when it has no choice."""
    return str(getattr(scheme, "rounding", ""))


def scales_inputs(scheme: Scheme | None) -> bool:
    """Whether its tensors hold a scale for their inputs (torchao's ``act_pre_scale``)."""
    kinds = (Int8DynActInt8Weight, Int8WeightOnly, Int4WeightOnly)
    return isinstance(scheme, kinds) and rounding_of(scheme) in CALIBRATED


def round_by(recipe: Recipe, algorithm: str) -> Recipe:
    """The recipe with its weights rounded by ``algorithm`` (``affine`` is any scheme's plain way)."""
    choices = rounding_choices(recipe.scheme)
    value = choices[0] if choices and algorithm == "affine" else algorithm
    if value not in choices:
        known = ", ".join(("affine", *choices[1:]))
        raise UsageError(f"--algorithm {algorithm} is not possible with {recipe.name}", f"One of {known}")
    return _possible(replace(recipe, scheme=replace(recipe.scheme, rounding=value)))  # type: ignore[call-arg, arg-type]


def _possible(recipe: Recipe) -> Recipe:
    """The recipe; raises `UsageError` for options that torchao takes together and then ignores one of."""
    asymmetric = getattr(recipe.scheme, "mapping", "") == "asymmetric"
    if asymmetric and getattr(recipe.scheme, "rounding", "") == "hqq":
        raise UsageError(
            f"{recipe}: torchao's hqq is symmetric only", "Use rounding=mse or mapping=symmetric"
        )
    return recipe


def spell(recipe: Recipe) -> str:
    """The inverse of `parse_recipe`: the shortest text that parses to this recipe."""
    base = RECIPES[recipe.name].scheme
    changed = [
        f"{f.name}={getattr(recipe.scheme, f.name)}"
        for f in fields(recipe.scheme)
        if getattr(recipe.scheme, f.name) != getattr(base, f.name)
    ]
    return recipe.name + (":" + ",".join(changed) if changed else "")


def recipe_for(scheme: Scheme) -> Recipe:
    """The named recipe nearest to a scheme: equal, else of its class and bits, with the scheme's own options."""
    same_class = [r for r in RECIPES.values() if type(r.scheme) is type(scheme)]
    bits = getattr(scheme, "bits", None)
    same_bits = [r for r in same_class if getattr(r.scheme, "bits", None) == bits]
    return replace((same_bits or same_class)[0], scheme=scheme)


def nominal_bits(scheme: Scheme) -> float:
    """Bits per weight of the number format alone."""
    match scheme:
        case Int8DynActIntxWeight(bits=bits) | IntxWeightOnly(bits=bits) | MxDynActMxWeight(bits=bits):
            return bits
        case Int4WeightOnly() | Float8DynActInt4Weight() | Nvfp4WeightOnly() | Nvfp4DynActNvfp4Weight():
            return 4
    return 8


def stored_bits(scheme: Scheme, in_features: int, out_features: int, scale_bits: int = 16) -> float:
    """Bits per weight in torchao's storage for a weight of this shape; ``scale_bits`` of the model's own dtype."""
    match scheme:
        case Int8DynActIntxWeight(group_size=group) | IntxWeightOnly(group_size=group):
            # UNPACKED_TO_INT8: a whole byte a value whatever `bits` says, plus scale and int8 zero point a group.
            return 8 + (scale_bits + 8) / (group or in_features)
        case Int4WeightOnly(group_size=group):
            return 4 + 2 * scale_bits / group
        case Int8WeightOnly(granularity=granularity) | Int8DynActInt8Weight(granularity=granularity):
            return 8 + (32 + 8) / (in_features if granularity == "row" else in_features * out_features)
        case Float8WeightOnly(granularity=granularity) | Float8DynActFloat8Weight(granularity=granularity):
            return 8 + 32 / (in_features if granularity == "row" else in_features * out_features)
        case Nvfp4WeightOnly() | Nvfp4DynActNvfp4Weight():
            return 4 + 8 / 16
        case MxDynActMxWeight(bits=bits):
            return bits + 8 / 32
    return 4 + 2 * scale_bits / 128


def _option(name: str, key: str, value: str, hint: object) -> object:
    choices = getattr(hint, "__args__", None)
    if choices:
        for choice in choices:
            if str(choice) == value:
                return choice
        raise UsageError(
            f"recipe '{name}': {key}='{value}' is not possible", f"One of {', '.join(map(str, choices))}"
        )
    # Nine digits are beyond any model; Python refuses to read thousands of them.
    if not value.isdecimal() or len(value) > 9:
        raise UsageError(f"recipe '{name}': {key}='{value}' is no whole number", "Example: group_size=64")
    number = int(value)
    if key == "bits" and not 1 <= number <= 8:
        raise UsageError(f"recipe '{name}': bits={number} is not possible", "1 to 8")
    return number

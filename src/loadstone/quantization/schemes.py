"""Quantization schemes: frozen dataclasses with their options, and the table of named recipes. No torch here.

A scheme says how one weight is stored and multiplied; a recipe is a scheme with a name. ``torchao_config.py`` turns
schemes into torchao configs, and tensors back into schemes. To add a recipe, add a class and a line of `RECIPES` here,
and its config there.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_type_hints

from loadstone.artifact.compressed_tensors import LayerScheme, QuantArgs
from loadstone.artifact.compressed_tensors.scheme import FLOAT, INT, MXFP4, MXFP8, NAIVE, NVFP4, PACK
from loadstone.errors import UsageError
from loadstone.quantization.scheme import Scheme

Mapping = Literal["symmetric", "asymmetric"]
Granularity = Literal["row", "tensor"]


_ONE_SCALE = "one scale for the whole tensor would need all of them at once"


def _group_misfit(group_size: int, in_features: int) -> str:
    if group_size and in_features % group_size:
        return f"{in_features} input features are not a multiple of the group size {group_size}"
    return ""


def _scale_bits(granularity: str, bits: int, in_features: int, out_features: int) -> float:
    """Bits per weight of one scale of ``bits`` for each row, or for the whole tensor."""
    return bits / (in_features if granularity == "row" else in_features * out_features)


@dataclass(frozen=True)
class Intx(Scheme):
    """intx weights in groups (``group_size`` 0: per row), one int8 per value on disk."""

    bits: int = 4
    group_size: int = 32
    mapping: Mapping = "symmetric"

    experts_problem = "torchao's intx tensors are 2-D"
    # Whether the layer's inputs are quantized to int8 as it runs.
    dynamic_inputs: ClassVar[bool] = False

    @property
    def nominal_bits(self) -> float:
        return self.bits

    def stored_bits(self, in_features: int, out_features: int, scale_bits: int = 16) -> float:
        # UNPACKED_TO_INT8: a whole byte a value whatever `bits` says, plus scale and int8 zero point a group.
        return 8 + (scale_bits + 8) / (self.group_size or in_features)

    @property
    def row_multiple(self) -> int:
        return int(self.algorithm in ("affine", "mse"))

    @property
    def temporaries(self) -> int:
        # Plain rounding is our own (`rounding.plain_weight`).
        return 1 if self.algorithm == "affine" else 4

    @property
    def trains_exactly(self) -> bool:
        return self.mapping == "symmetric" and self.algorithm == "affine" and self.bits >= 2

    def misfit(self, out_features: int, in_features: int) -> str:
        return _group_misfit(self.group_size, in_features)


@dataclass(frozen=True)
class Int8DynActIntxWeight(Intx):
    """int8 dynamic activations (asymmetric, per token), intx weights in groups (``group_size`` 0: per row)."""

    rounding: Literal["affine", "mse", "hqq", "gptq", "awq", "smoothquant"] = "affine"

    dynamic_inputs = True
    unserved = (
        "no GPU kernel reads int8 inputs with weights in groups or of fewer bits",
        "intx4-weight-only",
    )


@dataclass(frozen=True)
class IntxWeightOnly(Intx):
    """intx weights in groups (``group_size`` 0: per row), one int8 per value on disk."""

    rounding: Literal["affine", "mse", "hqq", "gptq", "awq"] = "affine"

    embeds = True
    unserved = ("servers have kernels for 4 and 8 bits", "intx4-weight-only")

    @property
    def serving(self) -> LayerScheme | None:
        if self.bits not in (4, 8):
            return None
        weights = QuantArgs(self.bits, "int", "channel", symmetric=self.mapping == "symmetric")
        if self.group_size:
            weights = replace(weights, strategy="group", group_size=self.group_size)
        return LayerScheme(PACK, weights)


@dataclass(frozen=True)
class _Int8(Scheme):
    """int8 weights, symmetric, with a float32 scale for each row or for the tensor."""

    granularity: Granularity = "row"

    input_scale = True
    experts_problem = ""
    experts_one_by_one = True

    def experts_misfit(self) -> str:
        return _ONE_SCALE if self.granularity == "tensor" else ""

    def stored_bits(self, in_features: int, out_features: int, scale_bits: int = 16) -> float:
        return 8 + _scale_bits(self.granularity, 32 + 8, in_features, out_features)

    @property
    def row_multiple(self) -> int:
        return int(self.algorithm == "affine")

    @property
    def whole_extremes(self) -> bool:
        return self.granularity == "tensor"


@dataclass(frozen=True)
class Int8DynActInt8Weight(_Int8):
    """int8 dynamic activations (per token or per tensor), int8 weights of the same granularity."""

    act_mapping: Mapping = "symmetric"
    rounding: Literal["affine", "smoothquant"] = "affine"

    @property
    def serving(self) -> LayerScheme:
        inputs = QuantArgs(8, "int", "token", symmetric=self.act_mapping == "symmetric", dynamic=True)
        return LayerScheme(INT, QuantArgs(8, "int", "channel"), inputs)


@dataclass(frozen=True)
class Int8WeightOnly(_Int8):
    """int8 weights, symmetric."""

    rounding: Literal["affine", "awq"] = "affine"

    @property
    def serving(self) -> LayerScheme:
        return LayerScheme(PACK, QuantArgs(8, "int", "channel"))


@dataclass(frozen=True)
class Int4WeightOnly(Scheme):
    """uint4 weights in groups, packed for the tinygemm CUDA kernel (tile_packed_to_4d)."""

    group_size: Literal[32, 64, 128, 256] = 128
    rounding: Literal["tinygemm", "hqq", "awq"] = "tinygemm"

    unserved = ("its zero points are not integers", "intx4-weight-only:group_size=128,mapping=asymmetric")
    nominal_bits = 4
    input_scale = True
    experts_problem = "torchao's int4 tensors have no grouped product"

    def stored_bits(self, in_features: int, out_features: int, scale_bits: int = 16) -> float:
        return 4 + 2 * scale_bits / self.group_size

    def misfit(self, out_features: int, in_features: int) -> str:
        return _group_misfit(self.group_size, in_features)


# Sides of the squares that share a scale in block-wise FP8, as DeepSeek-V3 introduced it.
FLOAT8_BLOCK = 128


@dataclass(frozen=True)
class _Float8(Scheme):
    """float8 e4m3 weights with float32 scales."""

    granularity: Granularity = "row"

    def stored_bits(self, in_features: int, out_features: int, scale_bits: int = 16) -> float:
        return 8 + _scale_bits(self.granularity, 32, in_features, out_features)

    def experts_misfit(self) -> str:
        return "" if self.granularity == "row" else _ONE_SCALE


@dataclass(frozen=True)
class Float8WeightOnly(_Float8):
    """float8 e4m3 weights with float32 scales."""

    row_multiple = 1

    @property
    def whole_extremes(self) -> bool:
        return self.granularity == "tensor"

    @property
    def serving(self) -> LayerScheme:
        return LayerScheme(NAIVE, QuantArgs(8, "float", "channel"))


@dataclass(frozen=True)
class Float8DynActFloat8Weight(_Float8):
    """float8 e4m3 dynamic activations and weights."""

    # block: a scale for each square of 128 x 128, in the serving layout only.
    granularity: Literal["row", "tensor", "block"] = "row"  # type: ignore[assignment]

    side_multiple = 16

    def stored_bits(self, in_features: int, out_features: int, scale_bits: int = 16) -> float:
        if self.granularity == "block":
            return 8 + scale_bits / FLOAT8_BLOCK**2
        return super().stored_bits(in_features, out_features, scale_bits)

    @property
    def row_multiple(self) -> int:
        # torchao passes over weights whose sides are not a multiple of 16.
        return 16 if self.granularity == "row" else 0

    def misfit(self, out_features: int, in_features: int) -> str:
        if self.granularity == "block" and (out_features % FLOAT8_BLOCK or in_features % FLOAT8_BLOCK):
            return f"shape {out_features}x{in_features} is no multiple of {FLOAT8_BLOCK}"
        return super().misfit(out_features, in_features)

    @property
    def serving(self) -> LayerScheme:
        if self.granularity == "block":
            square = QuantArgs(8, "float", "block", block=(FLOAT8_BLOCK, FLOAT8_BLOCK))
            return LayerScheme(FLOAT, square, QuantArgs(8, "float", "group", FLOAT8_BLOCK, dynamic=True))
        inputs = QuantArgs(8, "float", "token", dynamic=True)
        return LayerScheme(FLOAT, QuantArgs(8, "float", "channel"), inputs)

    @property
    def weight_only(self) -> Scheme:
        return Float8Blocks() if self.granularity == "block" else Float8WeightOnly(self.granularity)


@dataclass(frozen=True)
class Float8Blocks(Scheme):
    """float8 e4m3 weights with a scale for each square of 128 x 128: our own rounding, in no recipe by itself."""

    row_multiple = FLOAT8_BLOCK
    side_multiple = FLOAT8_BLOCK


@dataclass(frozen=True)
class Float8DynActInt4Weight(Scheme):
    """float8 e4m3 dynamic activations per row, int4 weights in groups of 128 (preshuffled)."""

    nominal_bits = 4
    unserved = ("torchao packs it for one kernel", "intx4-weight-only:group_size=128")
    experts_problem = "torchao's int4 tensors have no grouped product"

    def stored_bits(self, in_features: int, out_features: int, scale_bits: int = 16) -> float:
        return 4 + 2 * scale_bits / 128


@dataclass(frozen=True)
class _Nvfp4(Scheme):
    """NVFP4 weights: e2m1 in blocks of 16 with e4m3 scales and one float32 scale per tensor."""

    nominal_bits = 4
    side_multiple = 16
    experts_problem = "torchao's NVFP4 configs take weights of Linears only"

    def stored_bits(self, in_features: int, out_features: int, scale_bits: int = 16) -> float:
        return 4 + 8 / 16


@dataclass(frozen=True)
class Nvfp4WeightOnly(_Nvfp4):
    """NVFP4 weights: e2m1 in blocks of 16 with e4m3 scales and one float32 scale per tensor."""

    # Scales are stored in tiles of 128 rows.
    row_multiple = 128
    whole_extremes = True

    @property
    def serving(self) -> LayerScheme:
        return LayerScheme(NVFP4, QuantArgs(4, "float", "tensor_group", 16))


@dataclass(frozen=True)
class Nvfp4DynActNvfp4Weight(_Nvfp4):
    """NVFP4 dynamic activations and weights. In the serving layout the range of the inputs is measured on text."""

    @property
    def serving(self) -> LayerScheme:
        inputs = QuantArgs(4, "float", "tensor_group", 16, dynamic="local")
        return LayerScheme(NVFP4, QuantArgs(4, "float", "tensor_group", 16), inputs)

    @property
    def weight_only(self) -> Scheme:
        return Nvfp4WeightOnly()


@dataclass(frozen=True)
class MxDynActMxWeight(Scheme):
    """OCP microscaling activations and weights in blocks of 32 with e8m0 scales, products computed by emulation."""

    bits: Literal[4, 8] = 4

    # Scales are stored in tiles of 128 rows.
    row_multiple = 128
    side_multiple = 32
    experts_problem = "torchao's MX configs take 2-D weights only"

    @property
    def nominal_bits(self) -> float:
        return self.bits

    def stored_bits(self, in_features: int, out_features: int, scale_bits: int = 16) -> float:
        return self.bits + 8 / 32

    @property
    def serving(self) -> LayerScheme:
        if self.bits == 4:
            return LayerScheme(MXFP4, QuantArgs(4, "float", "group", 32))
        inputs = QuantArgs(8, "float", "group", 32, dynamic=True, scale_dtype="uint8")
        return LayerScheme(MXFP8, QuantArgs(8, "float", "group", 32, scale_dtype="uint8"), inputs)


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
        return self.scheme.nominal_bits

    def stored_bits(self, in_features: int = 4096, out_features: int = 4096, scale_bits: int = 16) -> float:
        """Bits per weight that torchao stores, scales and zero points included, for a weight of this shape."""
        return self.scheme.stored_bits(in_features, out_features, scale_bits)

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
    """``NAME`` or ``NAME:option=value,…`` as a recipe; raises `UsageError` naming what is unknown."""
    name, _, options = text.strip().partition(":")
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"Did you mean '{close[0]}'? " if close else ""
        raise UsageError(f"unknown recipe '{name}'", f"{hint}`loadstone finalize --list-recipes` shows all")
    recipe = RECIPES[name]
    if not options:
        return recipe
    hints = {field.name: get_type_hints(type(recipe.scheme))[field.name] for field in fields(recipe.scheme)}
    changes: dict[str, object] = {}
    for option in options.split(","):
        key, _, value = option.strip().partition("=")
        key = key.replace("-", "_")
        if key not in hints:
            known = ", ".join(hints) or "none"
            raise UsageError(f"recipe '{name}' has no option '{key}'", f"Its options: {known}")
        changes[key] = _option(name, key, value, hints[key])
    return _possible(replace(recipe, scheme=replace(recipe.scheme, **changes)))  # type: ignore[type-var, arg-type]


def round_by(recipe: Recipe, algorithm: str) -> Recipe:
    """The recipe with its weights rounded by ``algorithm``; ``affine`` means the plain way of any scheme."""
    choices = recipe.scheme.algorithms
    value = choices[0] if choices and algorithm == "affine" else algorithm
    if value not in choices:
        known = ", ".join(("affine", *choices[1:]))
        raise UsageError(f"--algorithm {algorithm} is not possible with {recipe.name}", f"One of {known}")
    return _possible(replace(recipe, scheme=recipe.scheme.rounded_by(value)))


def _possible(recipe: Recipe) -> Recipe:
    """Return the recipe; raises `UsageError` for options of which torchao would ignore one."""
    asymmetric = getattr(recipe.scheme, "mapping", "") == "asymmetric"
    if asymmetric and recipe.scheme.algorithm == "hqq":
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


def _option(name: str, key: str, value: str, hint: object) -> object:
    choices = getattr(hint, "__args__", None)
    if choices:
        for choice in choices:
            if str(choice) == value:
                return choice
        raise UsageError(
            f"recipe '{name}': {key}='{value}' is not possible", f"One of {', '.join(map(str, choices))}"
        )
    # No model needs more than nine digits, and Python refuses to parse thousands of them.
    if not value.isdecimal() or len(value) > 9:
        raise UsageError(f"recipe '{name}': {key}='{value}' is not a whole number", "Example: group_size=64")
    number = int(value)
    if key == "bits" and not 1 <= number <= 8:
        raise UsageError(f"recipe '{name}': bits={number} is not possible", "1 to 8")
    return number

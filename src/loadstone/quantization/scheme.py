"""The base of quantization schemes: what planning, encoding and reports ask of one. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self, get_type_hints

from loadstone.artifact.compressed_tensors import LayerScheme

# Ways of rounding that need text (`finalize --calibrate`); the others look at the weight alone.
CALIBRATED = ("gptq", "awq", "smoothquant")


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored and multiplied. Subclasses are frozen: their fields are the options of a recipe.

    A class that has ways of rounding holds the chosen one in a field ``rounding``, the plain way first.
    """

    # Whether torchao's tensor has a place for a scale of the layer's inputs (``act_pre_scale``).
    input_scale: ClassVar[bool] = False
    # Whether torchao looks up rows in such a tensor, as an embedding does.
    embeds: ClassVar[bool] = False
    # Why fused experts, 3-D weights, are left unquantized (torchao 0.18); empty where they can be quantized.
    # transformers multiplies them by `grouped_mm`, which of torchao's tensors Float8Tensor alone implements, or one by
    # one, for which a 3-D tensor has to give the matrix of an expert: Int8Tensor does.
    experts_problem: ClassVar[str] = "torchao has no fused weights of this scheme"
    # Whether torchao has no grouped product for them: transformers then has to multiply expert by expert.
    experts_one_by_one: ClassVar[bool] = False
    # Both sides of a weight must be a multiple of this.
    side_multiple: ClassVar[int] = 1
    # Why no serving engine has a kernel for it, and the nearest recipe that they have one for.
    unserved: ClassVar[tuple[str, str]] = ("it is not among those that servers read", "intx4-weight-only")

    @property
    def nominal_bits(self) -> float:
        """Bits per weight of the number format alone."""
        return 8

    def stored_bits(self, in_features: int, out_features: int, scale_bits: int = 16) -> float:
        """Bits per weight that torchao stores, scales included; ``scale_bits`` is the width of the model's dtype."""
        raise NotImplementedError

    @property
    def row_multiple(self) -> int:
        """Rows of a weight can be quantized in blocks of any multiple of this number; 0: only all of them at once.

        Rows are independent wherever a scale belongs to a row or a group within it, or follows from extremes that are
        known (`whole_extremes`). hqq needs the whole tensor, since its iterations stop by the error of all of it, and
        so do tensors that are packed for a kernel.
        """
        return 0

    @property
    def whole_extremes(self) -> bool:
        """Whether a scale follows from the smallest and the largest value of the whole weight."""
        return False

    @property
    def temporaries(self) -> int:
        """Memory of quantizing as a multiple of that of a cast: torchao's own rounding takes four times as much."""
        return 4

    @property
    def serving(self) -> LayerScheme | None:
        """The scheme in the compressed-tensors layout; None where servers have no kernel (`unserved` says why).

        A scale of the whole tensor is stored once a row there: servers that merge layers would otherwise round the
        weights again to one scale.
        """
        return None

    @property
    def weight_only(self) -> Scheme:
        """The scheme that rounds weights to the same values and runs wherever torchao does."""
        return self

    @property
    def trains_exactly(self) -> bool:
        """Whether torchao's fake quantization in training computes what the converted tensors compute.

        For many schemes torchao has no fake quantization, or one that converts to other tensors.
        """
        return False

    def misfit(self, out_features: int, in_features: int) -> str:
        """Why a weight of this shape cannot be quantized; empty when it can."""
        if in_features == 1:
            return f"shape {out_features}x1 has one value a row"
        side = self.side_multiple
        if in_features % side or out_features % side:
            return f"shape {out_features}x{in_features} is not a multiple of {side}"
        return ""

    def experts_misfit(self) -> str:
        """Why fused experts (experts, out, in) cannot be quantized; empty when they can."""
        return self.experts_problem

    @property
    def algorithm(self) -> str:
        """How weights are rounded; empty where there is one way only."""
        return str(getattr(self, "rounding", ""))

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The ways of rounding, the plain one first; empty where there is one way only."""
        hint = get_type_hints(type(self)).get("rounding")
        return tuple(hint.__args__) if hint else ()

    @property
    def calibrated(self) -> bool:
        """Whether rounding needs text."""
        return self.algorithm in CALIBRATED

    @property
    def scales_inputs(self) -> bool:
        """Whether the tensors hold a scale for their inputs, as AWQ and SmoothQuant choose one."""
        return self.input_scale and self.calibrated

    def rounded_by(self, algorithm: str) -> Self:
        """The scheme with another way of rounding."""
        return replace(self, rounding=algorithm)  # type: ignore[call-arg]

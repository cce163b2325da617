"""How one group of layers is stored in the compressed-tensors layout: number format, scales, and what their inputs get.

The names are those of compressed-tensors' own config block, https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["tensor", "channel", "group", "tensor_group", "block", "token", "attn_head"]

PACK = "pack-quantized"
INT = "int-quantized"
FLOAT = "float-quantized"
NAIVE = "naive-quantized"
NVFP4 = "nvfp4-pack-quantized"
MXFP4 = "mxfp4-pack-quantized"
MXFP8 = "mxfp8-quantized"
MIXED = "mixed-precision"
# Of other quantizers: float8 values with a scale for each block, row or tensor; integers packed by columns.
FP8 = "fp8"
GPTQ = "gptq"
AWQ = "awq"
# Of bitsandbytes: tables of sixteen numbers with a factor for each block of values; int8 with one for each row.
NF4 = "nf4"
FP4 = "fp4"
LLM_INT8 = "llm.int8"
# The formats of compressed-tensors that are read here.
# Others (marlin-24, sparse-24-bitmask, mxfp6-pack-quantized, …) are refused by name.
FORMATS = (PACK, INT, FLOAT, NAIVE, NVFP4, MXFP4, MXFP8)


@dataclass(frozen=True)
class QuantArgs:
    """Quantization of a weight or of inputs.

    ``strategy`` says which values share a scale; ``group_size`` belongs to ``group`` and ``tensor_group``, ``block``
    (rows, columns) to ``block``. ``dynamic``: scales are computed while the model runs, ``"local"``: all but the
    scale of the whole tensor. ``actorder``: GPTQ's order of columns.
    """

    bits: int = 8
    type: Literal["int", "float"] = "int"
    strategy: Strategy = "tensor"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False
    actorder: str | None = None
    scale_dtype: str | None = None

    @property
    def grouped(self) -> bool:
        """Whether a row has a scale for each ``group_size`` values."""
        return self.strategy in ("group", "tensor_group")


@dataclass(frozen=True)
class LayerScheme:
    """Storage ``format`` of a weight, its quantization, and that of the layer's inputs (None: not quantized)."""

    format: str
    weights: QuantArgs
    inputs: QuantArgs | None = None

    @property
    def packed(self) -> bool:
        """Whether several values share a stored element (``weight_packed``); otherwise ``weight`` holds one each."""
        return self.format in (PACK, NVFP4, MXFP4)

    @property
    def measures_inputs(self) -> bool:
        """Whether a scale of the inputs is stored, which follows from their range on some text."""
        return self.inputs is not None and self.inputs.dynamic is not True

    def __str__(self) -> str:
        """The name that the field gives it: ``W4A16 g128``, ``FP8 dynamic``, ``NVFP4A16``."""
        inputs, weights = self.inputs, self.weights
        if self.format == FP8:
            high, wide = weights.block or (0, 0)
            sizes = f" {high}" if high == wide else f" {high}x{wide}"
            return f"FP8 {weights.strategy}{sizes if weights.block else ''}"
        if self.format in (NF4, FP4):
            return f"{self.format.upper()} g{weights.group_size}"
        if self.format == LLM_INT8:
            return "LLM.int8()"
        if self.format in (NVFP4, MXFP4, MXFP8):
            name = self.format.partition("-")[0].upper()
            return name if inputs else f"{name}A16"
        if weights.type == "float":
            if weights.strategy == "block":
                return "FP8 block"
            kind = "W8A16" if inputs is None else "dynamic" if inputs.dynamic else "static"
            return f"FP8 {kind} {weights.strategy}"
        activations = 16 if inputs is None else inputs.bits
        group = f"g{weights.group_size}" if weights.grouped else weights.strategy
        floating = "FP" if inputs is not None and inputs.type == "float" else ""
        return f"W{weights.bits}A{floating}{activations} {group}" + (
            "" if weights.symmetric else " asymmetric"
        )

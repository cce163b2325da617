"""Modules that replace Linear layers while a model is evaluated; `replace` chooses among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Products of two int8 values are at most 2**14, so float32 sums this many of them exactly.
_EXACT_TERMS = 1024
# How many products MKL adds before it starts a new sum.
_MKL_TERMS = 192
_ROWS_AT_ONCE = 256
# cuBLAS's int8 products take more than 16 rows.
_FEWEST_ROWS = 32
Rounding = Callable[[torch.Tensor], Any]


class Product(nn.Module):
    """x (..., in) times the transpose of a weight (out, in), plus a bias (out,)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)


class PackedProduct(nn.Module):
    """`Product` with the weight in oneDNN's blocked layout; float32 on a CPU only."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return result


class PackedProductInOrder(nn.Module):
    """`PackedProduct` with the bits of torch's own product on AMD CPUs. MKL adds ``_MKL_TERMS`` products one after the
    other and then these sums, for any number of rows from four on; oneDNN adds up to 512 one after the other. A recipe
    that rounds activations needs the bits: a difference in the last digit before rounding can become a whole level
    after it.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        terms = weight.shape[1]
        # A remainder of more than one block and less than two is split in half.
        self.terms = terms // 2 if _MKL_TERMS < terms < 2 * _MKL_TERMS else _MKL_TERMS
        self.packed = [
            torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), None)
            for part in weight.detach().split(self.terms, 1)
        ]

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        multiply = torch.ops.mkldnn._linear_pointwise
        pieces: list[torch.Tensor] = []
        # A few rows at a time, so that partial sums stay in the CPU cache.
        for rows in x.reshape(-1, x.shape[-1]).split(_ROWS_AT_ONCE):
            first, *rest = zip(rows.split(self.terms, 1), self.packed, strict=True)
            total = multiply(first[0].contiguous(), first[1], None, "none", [], "")
            if bias is not None:
                total.add_(bias)
            for part, packed in rest:
                total = multiply.binary(part.contiguous(), total, packed, None, "add")
            pieces.append(total)
        return torch.cat(pieces).reshape(*x.shape[:-1], -1)


class DequantizedLinear(nn.Module):
    """A Linear layer with a cached dequantized weight; ``rounding`` is how its recipe rounds activations."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, rounding: Rounding | None = None
    ) -> None:
        super().__init__()
        self.products = nn.ModuleList([Product(weight)])
        self.bias = bias
        self.rounding = rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.products[0](x if self.rounding is None else self.rounding(x), self.bias)


class PackedLinear(nn.Module):
    """An unquantized Linear layer with a packed weight."""

    def __init__(self, linear: nn.Linear, product: Callable[[torch.Tensor], nn.Module]) -> None:
        super().__init__()
        self.product = product(linear.weight)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.product(x, self.bias)
        return result


class DequantizedLinearBiasLast(DequantizedLinear):
    """`DequantizedLinear` where torchao adds the bias to the rounded product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.products[0](x)
        return out if self.bias is None else out + self.bias


class DequantizedLinearBfloat16(DequantizedLinear):
    """`DequantizedLinear` where the kernel computes in bfloat16 for any input dtype (tinygemm)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.products[0](x.to(torch.bfloat16))
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.to(x.dtype)


class Int8WeightLinear(DequantizedLinear):
    """int8 weights converted to the input dtype once; the scale (out,) multiplies the product, as in torchao."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor) -> None:
        super().__init__(weight, bias)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.products[0](x) * self.scale
        return out if self.bias is None else out + self.bias


class Int8DynamicLinear(nn.Module):
    """int8 activations times int8 weights (out, in). Subclasses differ in how ``multiply`` gets the exact integers."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, rounding: Rounding
    ) -> None:
        super().__init__()
        self.bias = bias
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.rounding = rounding
        self.set_weight(weight)

    def set_weight(self, weight: torch.Tensor) -> None:
        raise NotImplementedError

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Integers (n, out) from int8 rows (n, in), in a dtype that converts to float32 with one rounding."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, scales = self.rounding(x)
        whole = self.multiply(values.reshape(-1, x.shape[-1]))
        out = (whole.to(scales.dtype) * scales.reshape(-1, 1)).to(x.dtype) * self.scale
        out = out.reshape(*x.shape[:-1], -1)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class Int8LinearFloat32(Int8DynamicLinear):
    """The integer product computed exactly in float32, for CPUs without int8 instructions."""

    def set_weight(self, weight: torch.Tensor) -> None:
        parts = weight.float().split(_EXACT_TERMS, 1)
        self.products = nn.ModuleList([Product(part.contiguous()) for part in parts])

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        parts = [
            product(part)
            for product, part in zip(self.products, rows.float().split(_EXACT_TERMS, 1), strict=True)
        ]
        # Exact partial sums are added in float64 and rounded once, as an integer is when converted to float32.
        return parts[0] if len(parts) == 1 else torch.stack(parts).double().sum(0)


class Int8LinearCuda(Int8DynamicLinear):
    """The integer product on a GPU. At every eager call torchao copies the weight to the layout that cuBLAS is slowest
    with; below 17 rows it falls back to the CPU, or fails when compiled."""

    def set_weight(self, weight: torch.Tensor) -> None:
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[0]
        if count < _FEWEST_ROWS:
            rows = F.pad(rows, (0, 0, 0, _FEWEST_ROWS - count))
        return torch._int_mm(rows, self.weight.t())[:count]


class Int8LinearVnni(Int8DynamicLinear):
    """The integer product on CPUs that multiply unsigned by signed bytes (VNNI), with torchao's correction for the sign
    computed once."""

    def set_weight(self, weight: torch.Tensor) -> None:
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.correction = nn.Parameter(128 * weight.sum(1, dtype=torch.int32), requires_grad=False)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        unsigned = rows.view(torch.uint8) ^ 128
        return torch._int_mm(unsigned, self.weight.t()).sub_(self.correction)


class Float8DynamicLinear(nn.Module):
    """Float8 activations times float8 weights by torchao's own product, with the rounded input given to it: the bits of
    its Linear. Modules with the same input can share the rounding, which takes longer than the product."""

    def __init__(self, weight: Any, bias: torch.Tensor | None, rounding: Rounding) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.rounding = rounding
        stored = weight.detach()
        self._rounded_only = type(stored)(
            stored.qdata,
            stored.scale,
            block_size=stored.block_size,
            mm_config=stored.mm_config,
            kernel_preference=stored.kernel_preference,
            dtype=stored.dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The compiler shares and fuses the rounding itself.
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        return F.linear(self.rounding(x), self._rounded_only, self.bias)

"""The modules that stand in for quantized Linears while a model is evaluated (`fastpath` chooses)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Products of two int8 values are at most 2**14: so many of them sum exactly in float32.
_EXACT_TERMS = 1024
# How many products MKL adds before it starts a new sum.
_MKL_TERMS = 192
_ROWS_AT_ONCE = 256
# cuBLAS's int8 products take more than 16 rows.
_FEWEST_ROWS = 32
Rounding = Callable[[torch.Tensor], Any]


class Product(nn.Module):
    """x (..., in) times a weight (out, in), transposed."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)


class PackedProduct(nn.Module):
    """The same with a weight in oneDNN's own layout; float32 on a CPU only."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return result


class PackedInOrder(nn.Module):
    """The same to the bit of torch's own product there: MKL's kernel for AMD CPUs adds ``_MKL_TERMS`` products
    one after the other, and these sums one after the other, whatever the number of rows from four on; oneDNN's
    adds up to 512 one after the other. A recipe that rounds activations needs the bits: what differs in the
    last digit before the rounding differs by a whole level after it.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        terms = weight.shape[1]
        # What is more than one sum and less than two is halved.
        self.terms = terms // 2 if _MKL_TERMS < terms < 2 * _MKL_TERMS else _MKL_TERMS
        self.packed = [
            torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), None)
            for part in weight.detach().split(self.terms, 1)
        ]

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        multiply = torch.ops.mkldnn._linear_pointwise
        pieces: list[torch.Tensor] = []
        # A few rows at a time, so that sums stay in the cache until they are whole.
        for rows in x.reshape(-1, x.shape[-1]).split(_ROWS_AT_ONCE):
            first, *rest = zip(rows.split(self.terms, 1), self.packed, strict=True)
            total = multiply(first[0].contiguous(), first[1], None, "none", [], "")
            if bias is not None:
                total.add_(bias)
            for part, packed in rest:
                total = multiply.binary(part.contiguous(), total, packed, None, "add")
            pieces.append(total)
        return torch.cat(pieces).reshape(*x.shape[:-1], -1)


class Kept(nn.Module):
    """A Linear whose weight was dequantized once; ``rounding`` is what its recipe does to activations."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, rounding: Rounding | None = None
    ) -> None:
        super().__init__()
        self.products = nn.ModuleList([Product(weight)])
        self.bias = bias
        self.rounding = rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.products[0](x if self.rounding is None else self.rounding(x), self.bias)


class KeptPlain(nn.Module):
    """A plain Linear with a packed weight."""

    def __init__(self, linear: nn.Linear, product: Callable[[torch.Tensor], nn.Module]) -> None:
        super().__init__()
        self.product = product(linear.weight)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.product(x, self.bias)
        return result


class KeptBiasLast(Kept):
    """The same where torchao adds the bias to the rounded product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.products[0](x)
        return out if self.bias is None else out + self.bias


class KeptBfloat16(Kept):
    """The same where the kernel computes in bfloat16 whatever comes in (tinygemm)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.products[0](x.to(torch.bfloat16))
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.to(x.dtype)


class KeptInt8(Kept):
    """int8 weights widened once; the scale (out,) multiplies the product, as torchao does it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor) -> None:
        super().__init__(weight, bias)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.products[0](x) * self.scale
        return out if self.bias is None else out + self.bias


class KeptInt8Dynamic(nn.Module):
    """int8 activations times int8 weights (out, in): ``multiply`` gives the exact integers, in any way."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, rounding: Rounding
    ) -> None:
        super().__init__()
        self.bias = bias
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.rounding = rounding
        self.keep(weight)

    def keep(self, weight: torch.Tensor) -> None:
        raise NotImplementedError

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Integers (n, out) from int8 rows (n, in), as a number type that float32 is made of by rounding once."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, scales = self.rounding(x)
        whole = self.multiply(values.reshape(-1, x.shape[-1]))
        out = (whole.to(scales.dtype) * scales.reshape(-1, 1)).to(x.dtype) * self.scale
        out = out.reshape(*x.shape[:-1], -1)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class InFloats(KeptInt8Dynamic):
    """The integer product computed exactly in float32, for CPUs without integer products."""

    def keep(self, weight: torch.Tensor) -> None:
        parts = weight.float().split(_EXACT_TERMS, 1)
        self.products = nn.ModuleList([Product(part.contiguous()) for part in parts])

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        parts = [
            product(part)
            for product, part in zip(self.products, rows.float().split(_EXACT_TERMS, 1), strict=True)
        ]
        # Exact parts, added without rounding and rounded once, as an integer is when it turns to float.
        return parts[0] if len(parts) == 1 else torch.stack(parts).double().sum(0)


class OnTensorCores(KeptInt8Dynamic):
    """The integer product of a GPU. torchao copies the weight to the layout that cuBLAS is slowest with at
    every eager call, and gives up (falls back, or fails when compiled) below 17 rows."""

    def keep(self, weight: torch.Tensor) -> None:
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[0]
        if count < _FEWEST_ROWS:
            rows = F.pad(rows, (0, 0, 0, _FEWEST_ROWS - count))
        return torch._int_mm(rows, self.weight.t())[:count]


class OnVnni(KeptInt8Dynamic):
    """The integer product of CPUs that multiply unsigned by signed: torchao's, its correction for the sign
    computed once."""

    def keep(self, weight: torch.Tensor) -> None:
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.correction = nn.Parameter(128 * weight.sum(1, dtype=torch.int32), requires_grad=False)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        unsigned = rows.view(torch.uint8) ^ 128
        return torch._int_mm(unsigned, self.weight.t()).sub_(self.correction)

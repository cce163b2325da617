"""Stored keys and values of a language-model prefix: plain, int8, or as in transformers' quantized caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loadstone.errors import MissingError, UsageError

PLAIN = ("float32", "bfloat16", "float16")
# Name -> (bits of each value, the package that transformers' cache layer of that kind needs).
QUANTIZED = {
    "int8": (8, None), "fp8": (8, None), "quanto2": (2, "optimum-quanto"), "quanto4": (4, "optimum-quanto"),
    "hqq1": (1, "hqq"), "hqq2": (2, "hqq"), "hqq3": (3, "hqq"), "hqq4": (4, "hqq"), "hqq8": (8, "hqq"),
}  # fmt: skip
CACHE_KINDS = (*PLAIN, *QUANTIZED)


@dataclass(frozen=True, eq=False)
class Stored:
    """A key or value tensor (1, heads, rows, size), stored as ``kind`` in ``parts``; ``facts`` go into context.json."""

    kind: str
    parts: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``; quantized ones are expanded for the length of one attention."""
        if self.kind in PLAIN:
            return self.parts["data"].to(dtype)
        if self.kind in ("int8", "fp8"):
            return (self.parts["data"].float() * self.parts["scale"]).to(dtype)
        if self.kind.startswith("hqq"):
            return _hqq_read(self.parts, self.facts, dtype)
        return _quanto_read(self.parts, self.facts, dtype)

    def to(self, device: torch.device | str) -> Stored:
        return Stored(self.kind, {name: part.to(device) for name, part in self.parts.items()}, self.facts)


def check_kind(kind: str | None, model_dtype: torch.dtype) -> str:
    """The kind to store a cache in (None: the model's dtype). `UsageError` for an unknown one, `MissingError` for a
    package that is not here."""
    if kind is None:
        return str(model_dtype).removeprefix("torch.")
    if kind not in CACHE_KINDS:
        raise UsageError(f"a cache cannot be stored in {kind!r}", f"One of {', '.join(CACHE_KINDS)}")
    package = QUANTIZED.get(kind, (0, None))[1]
    if package is not None:
        _import(package)
    return kind


def keep(tensor: Tensor, kind: str, *, values: bool) -> Stored:
    """Keep a tensor (1, heads, rows, size) as ``kind``.

    int8 is symmetric: keys are scaled to each head and channel's largest (they have outlying channels), values to each
    head and row's (https://arxiv.org/abs/2402.02750). fp8 has one scale, as transformers' Fp8QuantizedLayer; hqq and
    quanto are the arithmetic of transformers' layers of that name, in groups of 64.
    """
    if kind in PLAIN:
        return Stored(kind, {"data": tensor.to(getattr(torch, kind)).contiguous()}, {})
    if kind == "int8":
        wide = tensor.float()
        scale = wide.abs().amax(-1 if values else -2, keepdim=True) / 127
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        data = (wide / scale).round().clamp(-127, 127).to(torch.int8)
        return Stored(kind, {"data": data, "scale": scale}, {})
    if kind == "fp8":
        # transformers 5.17 has no such layer yet; the arithmetic is that of the first one that does.
        wide = tensor.float()
        scale = (wide.abs().amax() / torch.finfo(torch.float8_e4m3fn).max).clamp(
            min=torch.finfo(torch.float32).tiny
        )
        return Stored(kind, {"data": (wide / scale).to(torch.float8_e4m3fn), "scale": scale[None]}, {})
    bits = QUANTIZED[kind][0]
    if kind.startswith("hqq"):
        return _hqq_keep(tensor, kind, bits)
    return _quanto_keep(tensor, kind, bits)


def _import(package: str) -> None:
    import importlib

    try:
        importlib.import_module({"optimum-quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}[package])
    except ImportError:
        raise MissingError(f"this cache needs {package}", f"pip install {package}") from None


def _group(tensor: Tensor) -> int:
    """Values that share a scale: 64 as in transformers, fewer where they do not divide the tensor."""
    return next(size for size in (64, 32, 16, 8, 4, 2, 1) if tensor.numel() % size == 0)


def _hqq_keep(tensor: Tensor, kind: str, bits: int) -> Stored:
    from hqq.core.quantize import Quantizer

    data, meta = Quantizer.quantize(
        tensor.contiguous(), axis=0, device=str(tensor.device), compute_dtype=tensor.dtype, nbits=bits,
        group_size=_group(tensor),
    )  # fmt: skip
    facts = {
        "shape": list(meta["shape"]),
        "axis": meta["axis"],
        "group_size": meta["group_size"],
        "nbits": bits,
    }
    parts = {"data": data.data, "scale": meta["scale"].to(data.device), "zero": meta["zero"].to(data.device)}
    return Stored(kind, parts, facts | {"packing": meta["packing"]})


def _hqq_read(parts: dict[str, Tensor], facts: dict[str, Any], dtype: torch.dtype) -> Tensor:
    from hqq.core.quantize import Quantizer

    meta = {
        **facts,
        "shape": torch.Size(facts["shape"]),
        "scale": parts["scale"],
        "zero": parts["zero"],
        "compute_dtype": dtype,
        "view_as_float": False,
        "unpack_view_dtype": Quantizer.unpack_view_dtype[facts["packing"]],
    }
    result: Tensor = Quantizer.dequantize(parts["data"], meta)
    return result.to(dtype)


def _quanto_keep(tensor: Tensor, kind: str, bits: int) -> Stored:
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    qtype, group = qint4 if bits == 4 else qint2, _group(tensor)
    scale, shift = MaxOptimizer()(tensor.contiguous(), qtype, 0, group)
    packed = quantize_weight(tensor.contiguous(), qtype, 0, scale, shift, group)
    inner = packed._data
    facts = {"bits": bits, "shape": list(packed.size()), "groups": inner.size(0)}
    return Stored(kind, {"data": inner._data, "scale": packed._scale, "shift": packed._shift}, facts)


def _quanto_read(parts: dict[str, Tensor], facts: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """What quanto's ``dequantize`` gives, bit for bit, in plain torch: quanto would compile its unpacking first, for
    minutes. A byte holds one code of each of several blocks of groups (``optimum/quanto/library/unpack.py``)."""
    bits, data, scale, shift = facts["bits"], parts["data"], parts["scale"], parts["shift"]
    blocks = [(data >> bits * i) & (2**bits - 1) for i in range(8 // bits)]
    codes = torch.cat(blocks)[: facts["groups"]]
    if shift.is_floating_point():
        return (scale * codes - shift).reshape(facts["shape"]).to(dtype)
    return (scale * (codes.to(torch.int8) - shift.to(torch.int8))).reshape(facts["shape"]).to(dtype)

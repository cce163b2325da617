"""What tensors of one model have in common: one unlike its kind is damaged, or comes from another model.

Only headers are looked at. A changed dtype of the same width is otherwise silent: the same bytes read as
other numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from loadstone.artifact.files import Sink
from loadstone.artifact.formats.safetensors import DTYPE_BITS, TensorInfo
from loadstone.artifact.torchao.checks import FlatTensor, looks_flattened
from loadstone.errors import ArtifactError


def pattern_of(name: str) -> str:
    """``model.layers.12.mlp.up_proj.weight -> model.layers.*.mlp.up_proj.weight``."""
    return _NUMBER.sub(".*", name)


def check_layers(tensors: dict[str, TensorInfo], sink: Sink) -> None:
    """Reports a plain tensor whose dtype differs from the same tensor's in other layers, at equal width.

    Different widths (a layer kept in float32) are a choice; BF16 in one layer and F16 in the next is not.
    """
    groups: dict[tuple[str, int], list[TensorInfo]] = {}
    overall: Counter[Any] = Counter()
    for tensor in tensors.values():
        if not looks_flattened(tensor.name):
            groups.setdefault((pattern_of(tensor.name), DTYPE_BITS[tensor.dtype]), []).append(tensor)
            overall[tensor.dtype] += 1
    for group in groups.values():
        for tensor, usual in _odd_ones(((t, t.dtype) for t in group), overall):
            what = f"tensor '{tensor.name}' has dtype {tensor.dtype}, other layers have {usual}"
            sink(ArtifactError(f"{tensor.file}: {what}", _AGAIN))


def check_quantized(
    quantized: dict[str, FlatTensor],
    plain: dict[str, TensorInfo],
    config: dict[str, Any],
    sink: Sink,
    *,
    by_module: bool = False,
) -> None:
    """Reports quantized tensors that compute unlike the rest of the model.

    ``by_module``: config.json gives modules schemes of their own, so layers may differ in quantizing activations.
    """
    groups: dict[tuple[Any, ...], list[FlatTensor]] = {}
    for tensor in quantized.values():
        own = tensor.quantizes_activations if by_module else None
        key = (pattern_of(tensor.name), tensor.type, tensor.nominal_bits, own)
        groups.setdefault(key, []).append(tensor)
    overall = Counter(t.quantizes_activations for t in quantized.values())
    dtypes = Counter(p.dtype for t in quantized.values() for p in t.parts.values())
    for group in groups.values():
        for tensor, usual in _odd_ones(((t, t.quantizes_activations) for t in group), overall):
            what = "does not quantize activations" if usual else "quantizes activations"
            where = f"{tensor.parts['qdata'].file}: quantized tensor '{tensor.name}'"
            sink(ArtifactError(f"{where} {what}, unlike the same in other layers", _AGAIN))
        for name in group[0].parts:
            parts = [t.parts[name] for t in group if name in t.parts]
            for part, usual in _odd_ones(((p, p.dtype) for p in parts), dtypes):
                what = f"'{part.name}' has dtype {part.dtype}, other layers have {usual}"
                sink(ArtifactError(f"{part.file}: {what}", _AGAIN))
    _check_dtypes(quantized, plain, config, sink)


def _check_dtypes(
    quantized: dict[str, FlatTensor], plain: dict[str, TensorInfo], config: dict[str, Any], sink: Sink
) -> None:
    """Reports tensors that would dequantize to another dtype than the rest of the model computes in."""
    counts = Counter(t.dtype for t in quantized.values() if t.dtype)
    if not counts:
        return
    usual = counts.most_common(1)[0][0]
    for tensor in quantized.values():
        if tensor.dtype not in (None, usual):
            what = f"quantized tensor '{tensor.name}' dequantizes to {tensor.dtype}, the others to {usual}"
            sink(ArtifactError(f"{tensor.parts['qdata'].file}: {what}", _AGAIN))
    spelled = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    known = {spelled[t.dtype] for t in plain.values() if t.dtype in spelled}
    declared = config.get("dtype") or config.get("torch_dtype")
    if isinstance(declared, str):
        known.add(declared.removeprefix("torch."))
    if known and usual not in known:
        first = next(t for t in quantized.values() if t.dtype == usual)
        what = f"quantized tensors dequantize to {usual}, the model computes in {' or '.join(sorted(known))}"
        sink(ArtifactError(f"{first.parts['qdata'].file}: {what} (first is '{first.name}')", _AGAIN))


def _odd_ones(items: Iterable[tuple[Any, Any]], overall: Counter[Any]) -> list[tuple[Any, Any]]:
    """(item, usual value) for each item whose value is not the most common; ``overall`` settles a draw."""
    pairs = list(items)
    counts = Counter(value for _, value in pairs)
    if len(counts) < 2:
        return []
    usual = max(counts, key=lambda value: (counts[value], overall[value]))
    return [(item, usual) for item, value in pairs if value != usual]


_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_AGAIN = "Copy the file again, or finalize again from the source"

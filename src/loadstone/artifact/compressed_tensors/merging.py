"""Which layers servers merge into one, and how far a weight can be divided among GPUs.

vLLM and SGLang load q, k and v (gate and up, …) as one matrix, so these must be stored in one scheme or all be plain.
The sets are those of vLLM 0.32 (``packed_modules_mapping`` and ``orig_to_new_stacked`` of its models).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

from loadstone.artifact.compressed_tensors.layout import row_tile
from loadstone.artifact.compressed_tensors.scheme import LayerScheme

MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
# Layers that are cut along their inputs; the others along their outputs.
_ROW_PARALLEL = ("o_proj", "down_proj", "w2", "wo", "out_proj", "dense_4h_to_h", "c_proj", "fc2")
_SET_OF = {name: names for names in MERGED for name in names}


def merged_sets(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The sets of two or more of ``modules`` (by name) that servers merge, in the order of their outputs."""
    found: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for module in modules:
        parent, _, last = module.rpartition(".")
        names = _SET_OF.get(last)
        if names:
            found.setdefault((parent, names), set()).add(last)
    return [
        tuple(f"{parent}.{name}" if parent else name for name in names if name in present)
        for (parent, names), present in found.items()
        if len(present) > 1
    ]


def largest_division(weights: Iterable[tuple[str, LayerScheme, tuple[int, int]]]) -> int:
    """The most GPUs that all ``weights`` (module, scheme, shape) can be divided among.

    Layers that are cut along their inputs need whole groups on each GPU, the others whole blocks of outputs.
    """
    common = 0
    for module, scheme, (rows, columns) in weights:
        if module.rpartition(".")[2] in _ROW_PARALLEL:
            unit = scheme.weights.group_size or (scheme.weights.block or (1, 1))[1]
            common = gcd(common, columns // unit if columns % unit == 0 else 1)
        else:
            unit = row_tile(scheme)
            common = gcd(common, rows // unit if rows % unit == 0 else 1)
    return common or 1

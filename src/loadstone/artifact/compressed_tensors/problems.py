"""What makes a compressed-tensors artifact fail, or silently wrong, elsewhere: found from its config and headers.

Here such an artifact may load all the same, since the tensors say enough.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from loadstone.artifact.compressed_tensors.block import Block
from loadstone.artifact.compressed_tensors.merging import merged_sets
from loadstone.artifact.compressed_tensors.scheme import NVFP4, PACK
from loadstone.artifact.compressed_tensors.tensors import PackedWeight, is_side_tensor
from loadstone.artifact.files import open_regular
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.errors import ArtifactError

COMPRESSED = "compressed"


def serving_problems(
    directory: Path,
    config: dict[str, Any],
    block: Block,
    packed: dict[str, PackedWeight],
    tensors: dict[str, TensorInfo],
) -> list[ArtifactError]:
    """One `ArtifactError` for each problem that a server or stock transformers would have with the artifact."""
    weights = {weight.module: weight for weight in packed.values()}
    parts = {part.name for weight in packed.values() for part in weight.parts.values()}
    plain = {n: t for n, t in tensors.items() if n not in parts and not is_side_tensor(n)}
    return [
        *_status(block),
        *_not_ignored(block, config, weights, plain),
        *_ignored(block, weights),
        *_tensors(weights, plain),
        *_input_scales(weights, tensors),
        *_merged(directory, weights, tensors),
    ]


def _status(block: Block) -> list[ArtifactError]:
    if block.status == COMPRESSED:
        return []
    said = "missing" if block.status is None else ascii(block.status)[:80]
    return [
        ArtifactError(
            f"config.json: quantization_status is {said}: transformers would take packed weights for others, "
            "in silence",
            f'Set it to "{COMPRESSED}"',
        )
    ]


def _not_ignored(
    block: Block, config: dict[str, Any], weights: dict[str, PackedWeight], plain: dict[str, TensorInfo]
) -> list[ArtifactError]:
    modules = [
        name.removesuffix(".weight")
        for name, info in plain.items()
        if name.endswith(".weight") and len(info.shape) == 2 and not _LOOKED_UP.search(name.split(".")[-2])
    ]
    tied = [inner.get("tie_word_embeddings") for inner in (config, config.get("text_config")) if inner]
    stored = {name.split(".")[0] for name in (*weights, *plain)}
    # Other classes have no head, or call it something else.
    writes = any(name.endswith("ForCausalLM") for name in config.get("architectures") or ["ForCausalLM"])
    if writes and not stored & {"lm_head", "cls"} and True in tied:
        modules.append("lm_head")
    found = [m for m in modules if not block.ignores(m) and block.scheme_of(m) is not None]
    if not found:
        return []
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return [
        ArtifactError(
            f"config.json: '{found[0]}'{more} is stored plain, and 'ignore' does not name it: transformers and "
            "servers look for its packed weight",
            "Add it to 'ignore' of quantization_config",
        )
    ]


def _ignored(block: Block, weights: dict[str, PackedWeight]) -> list[ArtifactError]:
    found = next((module for module in weights if block.ignores(module)), None)
    if found is None:
        return []
    return [
        ArtifactError(f"config.json: 'ignore' names '{found}', which is quantized", "Remove it from 'ignore'")
    ]


def _tensors(weights: dict[str, PackedWeight], plain: dict[str, TensorInfo]) -> list[ArtifactError]:
    """The first weight with each kind of problem."""
    dtypes = Counter(t.dtype for t in plain.values() if t.dtype in FLOAT_DTYPES)
    usual = dtypes.most_common(1)[0][0] if dtypes else None
    found: dict[str, ArtifactError] = {}
    for module, weight in weights.items():
        scheme, scale = weight.scheme, weight.parts["weight_scale"]
        args, columns = scheme.weights, weight.shape[1]
        if scheme.format == PACK and "weight_shape" not in weight.parts:
            what = f"'{module}' lacks weight_shape, which transformers and servers read"
            found.setdefault("shape", ArtifactError(what, _AGAIN))
        if args.strategy != "tensor" and scale.dtype in FLOAT_DTYPES and usual not in (None, scale.dtype):
            what = f"'{scale.name}' has dtype {scale.dtype}, the model {usual}: transformers casts it"
            found.setdefault(
                "scale", ArtifactError(f"{what}, and weights change", f"Store scales in {usual}")
            )
        if args.grouped and columns % (args.group_size or 1):
            what = f"'{module}' has {columns} columns, no multiple of the group size {args.group_size}: vLLM fails"
            found.setdefault("group", ArtifactError(what, "Leave it and the layers merged with it plain"))
        if args.actorder == "group" or "weight_g_idx" in weight.parts:
            what = (
                f"'{module}' has its columns in groups of another order (actorder group), which vLLM refuses"
            )
            found.setdefault("order", ArtifactError(what, "Quantize again with actorder static, or none"))
        if scheme.format == PACK and args.bits not in (2, 4, 8):
            what = (
                f"'{module}' packs {args.bits} bits, which compressed-tensors 0.17 and 0.18 read differently"
            )
            found.setdefault("bits", ArtifactError(what, "Use 4 or 8 bits"))
    return list(found.values())


def _input_scales(weights: dict[str, PackedWeight], tensors: dict[str, TensorInfo]) -> list[ArtifactError]:
    for module, weight in weights.items():
        if not weight.scheme.measures_inputs:
            continue
        name = "input_global_scale" if weight.scheme.format == NVFP4 else "input_scale"
        if f"{module}.{name}" not in tensors:
            return [
                ArtifactError(
                    f"'{module}' lacks {name}, by which its inputs are rounded ({weight.scheme})", _AGAIN
                )
            ]
    return []


def _merged(
    directory: Path, weights: dict[str, PackedWeight], tensors: dict[str, TensorInfo]
) -> list[ArtifactError]:
    modules = {*weights, *(n.removesuffix(".weight") for n in tensors if n.endswith(".weight"))}
    for members in merged_sets(modules):
        schemes = {module: weights[module].scheme if module in weights else None for module in members}
        if len(set(schemes.values())) > 1:
            said = ", ".join(f"{module}: {scheme or 'plain'}" for module, scheme in schemes.items())
            return [
                ArtifactError(
                    f"servers merge {said} into one layer, and they differ", "Store them alike, or all plain"
                )
            ]
    for members in merged_sets(m for m, w in weights.items() if w.scheme.format == NVFP4):
        inputs = [tensors.get(f"{module}.input_global_scale") for module in members]
        for what, parts in (
            ("weights", [weights[module].parts["weight_global_scale"] for module in members]),
            ("inputs", [part for part in inputs if part is not None]),
        ):
            if len({_number(directory, part) for part in parts}) > 1:
                return [
                    ArtifactError(
                        f"'{members[0]}' and the layers that servers merge with it have different global scales of "
                        f"their {what}: vLLM takes the largest, and {what} change",
                        "Quantize them with one scale (loadstone finalize does)",
                    )
                ]
    return []


def _number(directory: Path, info: TensorInfo) -> float:
    """The one float32 of a stored tensor."""
    with open_regular(directory / info.file) as file:
        file.seek(info.begin)
        return float(struct.unpack("<f", file.read(4))[0])


# Last part of the name of a module whose rows are looked up: an embedding, no Linear.
_LOOKED_UP = re.compile(r"embed|wte|wpe|tok_|bias|norm|conv|(_|^)emb$|^shared$|^w$")
_AGAIN = "Make the artifact again"

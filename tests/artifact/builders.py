"""Model directories made by hand, byte by byte, so that each may be damaged at will. No torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from loadstone.artifact.formats.safetensors import DTYPE_BITS

Shapes = dict[str, tuple[str, tuple[int, ...]]]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
TORCHAO_BLOCK: dict[str, Any] = {
    "quant_method": "torchao",
    "modules_to_not_convert": None,
    "include_input_output_embeddings": False,
    "untie_embedding_weights": False,
    "quant_type": {
        "default": {
            "_type": "Int8DynamicActivationIntxWeightConfig",
            "_version": 2,
            "_data": {
                "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
                "weight_granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}},
                "act_mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"},
            },
        }
    },
}
INTX: dict[str, Any] = {
    "_type": "IntxUnpackedToInt8Tensor",
    "_data": {
        "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
        "block_size": [1, 32],
        "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        "activation_quantization": "int8_asym_per_token",
    },
    "_tensor_data_names": ["qdata", "scale", "zero_point"],
}


def write_safetensors(path: Path, tensors: Shapes, metadata: dict[str, str] | None = None) -> None:
    """A file of zeros with the named tensors, in order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = (prod(shape) * DTYPE_BITS[dtype] + 7) // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    write_raw(path, json.dumps(header).encode(), bytes(offset))


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A file with this header, true or false ``length``, and these bytes of data."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header in place; the data stays as it is."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    write_raw(path, json.dumps(header).encode(), raw[8 + length :])


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def layer(number: int) -> Shapes:
    """Plain tensors of one small layer."""
    prefix = f"model.layers.{number}"
    return {
        f"{prefix}.mlp.up_proj.weight": ("BF16", (64, 64)),
        f"{prefix}.input_layernorm.weight": ("BF16", (64,)),
    }


def dense(directory: Path, shards: int = 1, config: dict[str, Any] | None = None) -> Path:
    """A plain model directory of two layers in one file, or one layer a shard."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    files = [{"model.embed_tokens.weight": ("BF16", (32, 64))} | layer(0), layer(1)]
    _write_shards(directory, files, [None, None], shards)
    return directory


def torchao(directory: Path, shards: int = 1, config: dict[str, Any] | None = None) -> Path:
    """The same model with its two matrices quantized to int8 x int4."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(
        json.dumps(config or CONFIG | {"quantization_config": TORCHAO_BLOCK})
    )
    files: list[Shapes] = []
    described: dict[str, str] = {}
    for number in (0, 1):
        prefix = f"model.layers.{number}"
        tensors: Shapes = {"model.embed_tokens.weight": ("BF16", (32, 64))} if number == 0 else {}
        tensors |= {
            f"{prefix}.mlp.up_proj._weight_qdata": ("I8", (64, 64)),
            f"{prefix}.mlp.up_proj._weight_scale": ("BF16", (64, 2)),
            f"{prefix}.mlp.up_proj._weight_zero_point": ("I8", (64, 2)),
            f"{prefix}.input_layernorm.weight": ("BF16", (64,)),
        }
        described |= {n: json.dumps({"_type": "Tensor"}) for n in tensors if "._" not in n}
        described[f"{prefix}.mlp.up_proj.weight"] = json.dumps(INTX)
        files.append(tensors)
    described["lm_head.weight"] = json.dumps({"_type": "Tensor"})
    metadata = {"format": "pt", "tensor_names": json.dumps(list(described))} | described
    _write_shards(directory, files, [metadata, metadata], shards)
    return directory


def _write_shards(
    directory: Path, files: list[Shapes], metadata: list[dict[str, str] | None], shards: int
) -> None:
    if shards == 1:
        write_safetensors(
            directory / "model.safetensors", files[0] | files[1], metadata[0] or {"format": "pt"}
        )
        return
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        write_safetensors(directory / name, tensors, metadata[number - 1] or {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(prod(shape) * DTYPE_BITS[dtype] // 8 for t in files for dtype, shape in t.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))

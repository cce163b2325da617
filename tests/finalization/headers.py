"""Sparse shards with the headers of a 671B mixture of experts: all that planning looks at, and no data."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_headers(
    out: Path, *, fp8: bool = False, layers: int = 61, mtp: bool = True, experts: int = 256
) -> int:
    """The directory of a model of DeepSeek-V3's shape, 1.3 TB by its headers; returns the number of tensors.

    ``fp8``: as it is published, 0.7 TB: float8 in blocks of 128 with their scales, and with ``mtp`` a layer for
    multi-token prediction after the others.
    """
    hidden, inner = 7168, 2048
    tensors: dict[str, list[int]] = {
        "model.embed_tokens.weight": [129280, hidden],
        "lm_head.weight": [129280, hidden],
    }
    tensors["model.norm.weight"] = [hidden]
    for layer in range(layers + (fp8 and mtp)):
        # transformers leaves out the 62nd layer, whatever the number of layers is.
        p = f"model.layers.{61 if layer == layers else layer}"
        tensors |= {
            f"{p}.input_layernorm.weight": [hidden],
            f"{p}.post_attention_layernorm.weight": [hidden],
            f"{p}.self_attn.q_a_proj.weight": [1536, hidden],
            f"{p}.self_attn.q_a_layernorm.weight": [1536],
            f"{p}.self_attn.q_b_proj.weight": [24576, 1536],
            f"{p}.self_attn.kv_a_proj_with_mqa.weight": [576, hidden],
            f"{p}.self_attn.kv_a_layernorm.weight": [512],
            f"{p}.self_attn.kv_b_proj.weight": [32768, 512],
            f"{p}.self_attn.o_proj.weight": [hidden, 16384],
        }
        names = [f"{p}.mlp"] if layer < 3 else [f"{p}.mlp.shared_experts"]
        names += [f"{p}.mlp.experts.{e}" for e in range(experts)] if layer >= 3 else []
        for name in names:
            width = 18432 if layer < 3 else inner
            tensors |= {
                f"{name}.gate_proj.weight": [width, hidden],
                f"{name}.up_proj.weight": [width, hidden],
            }
            tensors[f"{name}.down_proj.weight"] = [hidden, width]
        if layer >= 3:
            tensors[f"{p}.mlp.gate.weight"] = [experts, hidden]
            tensors[f"{p}.mlp.gate.e_score_correction_bias"] = [experts]
        if layer == layers:
            tensors |= {
                f"{p}.embed_tokens.weight": [129280, hidden],
                f"{p}.enorm.weight": [hidden],
                f"{p}.hnorm.weight": [hidden],
                f"{p}.eh_proj.weight": [hidden, 2 * hidden],
                f"{p}.shared_head.norm.weight": [hidden],
                f"{p}.shared_head.head.weight": [129280, hidden],
            }
    dtypes = dict.fromkeys(tensors, "BF16")
    for name in [name for name in tensors if "_proj" in name and "eh_proj" not in name] * fp8:
        if name.endswith(".weight"):
            rows, columns = tensors[name]
            dtypes[name] = "F8_E4M3"
            tensors[f"{name}_scale_inv"] = [-(-rows // 128), -(-columns // 128)]
            dtypes[f"{name}_scale_inv"] = "F32"
    out.mkdir()
    names = sorted(tensors)
    count = 163
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        header, position = {}, 0
        for name in names[number * len(names) // count : (number + 1) * len(names) // count]:
            width = {"BF16": 2, "F8_E4M3": 1, "F32": 4}[dtypes[name]]
            size = width * tensors[name][0] * (tensors[name][1] if len(tensors[name]) > 1 else 1)
            header[name] = {
                "dtype": dtypes[name],
                "shape": tensors[name],
                "data_offsets": [position, position + size],
            }
            weight_map[name] = file
            position += size
        raw = json.dumps(header).encode()
        with (out / file).open("wb") as handle:
            handle.write(struct.pack("<Q", len(raw)) + raw)
            handle.truncate(8 + len(raw) + position)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        dtype="bfloat16",
        num_hidden_layers=layers,
        n_routed_experts=experts,
    )
    config.save_pretrained(out)
    if fp8:
        block = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        }
        text = json.loads((out / "config.json").read_text()) | {"quantization_config": block}
        (out / "config.json").write_text(json.dumps(text))
    return len(tensors)

"""Small mixtures whose experts are stored in every layout that is divided here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loadstone.quantization.model_facts import ExpertLayout

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
# Family -> config class, options, whether experts are stored (in, out), gate and up in turn, their names.
_GATED = ("gate_proj", "up_proj", "down_proj")
FAMILIES: dict[str, tuple[str, dict[str, Any], ExpertLayout, tuple[str, ...]]] = {
    "gpt-oss": (
        "GptOssConfig",
        {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
        ExpertLayout(transposed=True, interleaved=True), _GATED,
    ),
    "llama4": (
        "Llama4TextConfig",
        {"intermediate_size": 96, "intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1,
         "interleave_moe_layer_step": 1},
        ExpertLayout(transposed=True), _GATED,
    ),
    # Both sides of its merged tensor are equal: shapes of one tensor would not tell.
    "llama4-square": (
        "Llama4TextConfig",
        {"intermediate_size": 32, "intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1,
         "interleave_moe_layer_step": 1},
        ExpertLayout(transposed=True), _GATED,
    ),
    "mixtral": (
        "MixtralConfig", {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}, ExpertLayout(),
        ("w1", "w3", "w2"),
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"intermediate_size": 128, "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2},
        ExpertLayout(), _GATED,
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {"intermediate_size": 128, "moe_intermediate_size": 96, "n_shared_experts": 1, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32,
         "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 16, "head_dim": 16,
         "num_key_value_heads": 4},
        ExpertLayout(), _GATED,
    ),
}  # fmt: skip


def save_mixture(family: str, directory: Path, **changes: Any) -> Path:
    """A random bfloat16 model of a family, as transformers saves it. ``changes``: of its config."""
    import transformers

    name, options, *_ = FAMILIES[family]
    config = getattr(transformers, name)(**(SIZES | options | changes))
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        # Some classes leave their experts empty.
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(directory)
    return directory

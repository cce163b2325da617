"""A tiny configuration for every model type that transformers registers: general rules, then a table of exceptions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from tests.zoo.exceptions import EXCEPTIONS

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, LAYERS, VOCAB, IMAGE = 64, 96, 4, 16, 2, 256, 32
# Ids of special tokens that do not fit the small vocabulary move here; inputs use ids below it.
FIRST_SPECIAL = 160


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _to(size: int) -> Callable[[int], int]:
    """Sizes that default to 0 or 1 switch something off, so they stay."""
    return lambda value: value if value <= 1 else size


# The first pattern that matches a whole field name gives its size.
RULES: list[tuple[str, Callable[[int], int]]] = [
    (r"query_dim", lambda value: value),
    (r"rotary_dim", _at_most(HEAD_DIM // 2)),
    (r"mamba_(?:n_heads|num_heads)", lambda value: 2 * HIDDEN // HEAD_DIM),
    (r"mamba_d_ssm", lambda value: 2 * HIDDEN),
    (r"(?:.*_)?(?:kv_heads|key_value_heads|num_key_heads)", lambda value: min(value, 2)),
    (r"(?:.*_)?(?:num_heads|n_heads?|heads|attention_heads|head_num|nheads)", _at_most(HEADS)),
    (r"(?:.*_)?(?:num_value_heads)", _at_most(HEADS)),
    (r"qk_head_dim", _to(2 * HEAD_DIM)),
    (
        r"(?:.*_)?(?:head_dim|head_size|d_kv|d_head|mamba_d_head|kv_channels|dim_head|attention_head_dim)",
        _to(HEAD_DIM),
    ),
    (
        r"(?:.*_)?(?:num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks|num_res_blocks)",
        _at_most(LAYERS),
    ),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", _at_most(1)),
    (r"(?:.*_)?(?:vocab_size|num_embeddings|codebook_size)|vocab_offset", _at_most(VOCAB)),
    (r"(?:.*_)?(?:num_experts_per_tok(?:en)?|topk_group|moe_topk|moe_k)", _at_most(2)),
    (r"(?:.*_)?(?:num_experts|num_local_experts|n_routed_experts|moe_num_experts)", _at_most(4)),
    (r"n_group|num_expert_group", _at_most(2)),
    (
        r"(?:.*_)?(?:intermediate_size|ffn_dim|d_ff|dff|mlp_dim|ffn_hidden_size|n_inner|dim_feedforward|feed_forward_size"
        r"|feedforward_dim|intermediate_dim|linear_units|dim_ff|d_inner|mlp_hidden_size)",
        _to(INTERMEDIATE),
    ),
    (r"(?:.*_)?lora_rank", _at_most(32)),
    (r"(?:.*_)?(?:d_state|state_size|ssm_state_size)", _at_most(16)),
    (r"(?:.*_)?(?:image_size|img_size)", _at_most(IMAGE)),
    (
        r"(?:.*_)?(?:hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embedding_dim|emb_dim|projection_dim"
        r"|proj_size|width|out_hidden_size|output_hidden_size|pooler_output_size|hidden_channels|codevector_dim"
        r"|latent_dim|output_dim|input_dim|projection_size|decoder_dim|encoder_dim|codebook_dim|hidden_units|dim"
        r"|word_embed_proj_dim|output_channels|projection_input_dim|backbone_hidden_size|fpn_hidden_size)",
        _to(HIDDEN),
    ),
    (
        r"(?:.*_)?(?:max_position_embeddings|n_positions|max_source_positions|max_target_positions)",
        _at_most(512),
    ),
    (r"upsample_groups", lambda value: HIDDEN),
    (r"num_filters|(?:.*_)?base_channels|model_hidden_channels|stem_channels", _at_most(16)),
    (r"upsample_initial_channel", _at_most(64)),
    (r"(?:.*_)?(?:num_queries|num_query_tokens|query_num)", _at_most(8)),
]
_RULES = [(re.compile(pattern), size) for pattern, size in RULES]
_SPECIAL = re.compile(
    r".*(?:_token_id|_token_index|_token_ids|_bos_id|_eos_id|_pad_id|_start_id|_end_id|_newline_id)"
)
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types")


def tiny_config(model_type: str) -> Any:
    """The configuration of a small model of this type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrink(CONFIG_MAPPING[model_type], {}, EXCEPTIONS.get(model_type, {}), {})


def _merge(general: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    both = general.keys() & special.keys()
    nested = {
        key: _merge(general[key], special[key])
        for key in both
        if isinstance(general[key], dict) and isinstance(special[key], dict)
    }
    return general | special | nested


def _shrink(cls: Any, start: dict[str, Any], exceptions: dict[str, Any], ids: dict[int, int]) -> Any:
    """`cls` with small sizes. ``start``: options the default is made with; ``ids``: where special tokens moved."""
    exceptions = _merge(EXCEPTIONS.get(cls.model_type, {}), exceptions)
    start = start | exceptions.get("start", {})
    default = cls(**start)
    options = dict(start)
    declared = {field.name: field for field in fields(cls)}
    specs = getattr(cls, "sub_configs_defaults", {})
    for name, value in vars(default).items():
        if name.startswith("_") or name in ("id2label", "label2id", "dtype", "transformers_version"):
            continue
        if hasattr(value, "to_dict"):
            init = dict(specs[name].init_kwargs) if name in specs else {}
            if isinstance(start.get(name), dict):
                init = {key: option for key, option in start[name].items() if key != "model_type"}
            options[name] = _shrink(type(value), init, exceptions.get(name, {}), ids)
        elif name not in declared or (declared[name].default is None and name not in start):
            continue  # derived from the sizes
        else:
            small = _small(name, value, ids)
            if small != value:
                options[name] = small
    for name in _PER_LAYER:
        kinds = getattr(default, name, None)
        if name in declared and isinstance(kinds, (list, tuple)) and kinds and isinstance(kinds[0], str):
            _layer_kinds(options, name, list(kinds))
    plain = vars(default)
    pair = "num_key_value_heads", "num_attention_heads"
    if all(name in options for name in pair) and plain.get(pair[0]) == plain.get(pair[1]):
        # Without grouped keys and values there are as many as query heads, and some classes insist.
        options[pair[0]] = options[pair[1]]
    for name, size in (("head_dim", HEAD_DIM), ("num_key_value_heads", 2)):
        if (
            name in declared
            and plain.get(name, size) is None
            and isinstance(plain.get("num_attention_heads"), int)
        ):
            options[name] = size
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):
        options["rope_parameters"] = _sections(dict(plain.get("rope_parameters") or {}))
    _stages(default, options)
    options |= {
        key: value for key, value in exceptions.items() if key != "start" and not _is_sub(default, key)
    }
    return cls(**options)


def _sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary frequencies divided among time, height and width."""
    half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    side = half * 3 // 8
    return (
        {"rope_type": "default", "rope_theta": 10000.0}
        | rope
        | {"mrope_section": [half - 2 * side, side, side]}
    )


def _stages(default: Any, options: dict[str, Any]) -> None:
    """A backbone hands on as many of its layers as before: the first ones."""
    indices = options.get("out_indices") or options.get("out_features")
    layers = next((n for n in ("num_hidden_layers", "num_layers") if n in options), None)
    names = getattr(default, "stage_names", None)
    if not indices or not layers or not names or len(names) - 1 <= options[layers]:
        return
    count = len(indices)
    options[layers] = max(count, options[layers])
    options.pop("out_features", None)
    options["out_indices"] = list(range(1, count + 1))


def _is_sub(config: Any, name: str) -> bool:
    return hasattr(getattr(config, name, None), "to_dict")


def _layer_kinds(options: dict[str, Any], name: str, kinds: list[str]) -> None:
    """One layer of each kind, in the order in which the kinds first appear."""
    different = list(dict.fromkeys(kinds))
    count = max(len(different), LAYERS)
    for other in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        if other in options:
            count = max(count, options[other])
            options[other] = count
    options[name] = (different + different[-1:] * count)[:count]


def _small(name: str, value: Any, ids: dict[int, int]) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if _SPECIAL.fullmatch(name):
            return value if value < FIRST_SPECIAL else ids.setdefault(value, FIRST_SPECIAL + len(ids))
        for pattern, size in _RULES:
            if pattern.fullmatch(name):
                return size(value)
        return value
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    ):
        return _small_list(name, value, ids)
    return value


def _small_list(name: str, value: Any, ids: dict[int, int]) -> Any:
    kind = type(value)
    if _SPECIAL.fullmatch(name):
        return kind(_small(name, v, ids) for v in value)
    if re.fullmatch(r"(?:.*_)?(?:depths|num_blocks|layer_depths|blocks_per_stage)", name):
        return kind(1 for _ in value)
    if re.fullmatch(r"(?:.*_)?(?:num_attention_heads|num_heads|num_attention_heads_per_stage)", name):
        return kind(HEADS if v >= HEADS else 2 if v > 1 else 1 for v in value)
    if re.fullmatch(
        r"(?:.*_)?(?:hidden_sizes|embed_dims|encoder_hidden_sizes|conv_dim|neck_hidden_sizes|embed_dim)", name
    ):
        return kind(min(v, HIDDEN) for v in value)
    if name == "image_size":
        return kind(min(v, IMAGE) for v in value)
    return value

"""What the general rules of `configs` get wrong, by model type (also where the type is a part of another).

An entry holds field values, exceptions of its parts under their names, and under "start" what its default is made with.
"""

from __future__ import annotations

from typing import Any

_RESNET = {
    "model_type": "resnet",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [32, 64, 64, 64],
    "embedding_size": 32,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_DETR: dict[str, Any] = {"start": {"backbone_config": _RESNET}}
_HGNET_PARENT: dict[str, Any] = {"encoder_in_channels": [32, 64, 64], "decoder_in_channels": [64, 64, 64]}
_ATOMS = {"num_spatial_rope_pairs_per_axis": 1, "num_uid_rope_pairs": 5}
_NO_EXTRA_EMBEDDING = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
# Kernel, stride and padding of each convolution.
_PADDLE_NECK: dict[str, Any] = {
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{direction}_{ratio}ratio": [kernel(size), 1, kernel(size, 0)]
            for direction, kernel in {
                "vertical_long_to_small_conv": lambda n, pad=None: [n, 1] if pad is None else [n // 2, 0],
                "horizontal_small_to_long_conv": lambda n, pad=None: [1, n] if pad is None else [0, n // 2],
                "symmetric_conv_long": lambda n, pad=None: n if pad is None else n // 2,
            }.items()
            for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
        },
    },
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_IMAGE_TOKEN = {"<image>": 200, "IMGIMGA": 201, "IMGIMGB": 202}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "autoformer": {"start": {"prediction_length": 8, "context_length": 16}},
    "beit": {"start": {"out_indices": [1, 2, 3, 4]}},
    "data2vec-vision": {"start": {"out_indices": [1, 2, 3, 4]}},
    "bit": {"num_groups": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 2], "resolution": 32},
    "chameleon": {"start": {"vocabulary_map": _IMAGE_TOKEN}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "conditional_detr": _DETR,
    "cosmos3_edge_text": {
        "start": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20]}
        }
    },
    "dab-detr": _DETR,
    "deformable_detr": _DETR,
    "deepseek_ocr2_text": {"start": {"mlp_layer_types": ["dense", "sparse"] * 16, "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "detr": _DETR,
    "diffusion_gemma_text": {"start": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dots1": {"start": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}},
    "emu3": {"start": {"vocabulary_map": _IMAGE_TOKEN}},
    "emu3_vqgan": {
        "base_channels": 32,
        "channel_multiplier": [1, 2],
        "attn_resolutions": [1],
        "hidden_size": 64,
    },
    "esm": {"start": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 32}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma4_text": {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16},
    "gpt_neo": {"start": {"attention_types": [[["global", "local"], 1]], "num_layers": 2}},
    "inkling_vision": {"n_layers": 4, "patch_size": 8},
    "univnet": {"model_in_channels": 16, "kernel_predictor_hidden_channels": 16},
    "informer": {"start": {"prediction_length": 8, "context_length": 16}},
    "lfm2_moe": {"start": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "omdet-turbo": _DETR,
    "perceiver": {"d_latents": 64, "num_latents": 16},
    "reformer": {
        "start": {
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [32, 32],
            "num_buckets": 4,
            "local_attn_chunk_length": 16,
            "lsh_attn_chunk_length": 16,
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "depth_pro": {
        "patch_size": 32,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [64, 64],
        "scaled_images_feature_dims": [64, 64, 64],
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "efficientloftr": {
        "stage_num_blocks": [1, 1, 1, 1],
        "out_features": [32, 32, 64, 64],
        "hidden_size": 64,
        "num_attention_layers": 1,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
    },
    "granite4_vision": {
        "start": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2"},
        "spatial_target_layers": [0, 1],
    },
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 2]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine_streaming_encoder": {"sliding_windows": [[16, 4], [16, 0]]},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nougat": {"start": {"encoder": {"model_type": "donut-swin"}}},
    "qwen4_exp_text": {
        "start": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        },
        "indexer_head_dim": 16,
        "ngram_vocab_size_base": 256,
        "split_ngram_parts": 2,
    },
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "qwen3_omni_moe_talker_text": {"start": {"shared_expert_intermediate_size": 32}},
    "tvp": {"visual_prompt_size": 8, "max_img_size": 64, "num_frames": 2},
    "vitmatte": {"fusion_hidden_sizes": [32, 32, 16, 16], "convstream_hidden_sizes": [16, 32, 32]},
    "lw_detr_vit": {"image_size": 64},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"dropout_rate": 0.0, "text_config": {"dropout_rate": 0.0}},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320},
    "dac": {"encoder_hidden_size": 8, "decoder_hidden_size": 64},
    "d_fine": _HGNET_PARENT,
    "deimv2": _HGNET_PARENT,
    "dinov3_convnext": {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "hgnet_v2": {
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 32, 32, 64],
        "stage_mid_channels": [16, 16, 16, 16],
        "stage_out_channels": [32, 32, 64, 64],
        "hidden_sizes": [32, 32, 64, 64],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "stage_num_blocks": [1, 1, 1, 1],
    },
    "mobilevitv2": {"width_multiplier": 0.25, "aspp_out_channels": 32},
    "neucodec": {"quantization_dim": 64, "encoder_hidden_size": 8},
    "pp_doclayout_v2": _HGNET_PARENT,
    "pp_doclayout_v3": _HGNET_PARENT,
    "pp_doclayout_v4": _HGNET_PARENT,
    "sam2": {"prompt_encoder_config": {"image_size": 128}},
    "sam2_hiera_det_model": {
        "image_size": [128, 128],
        "window_size_per_stage": [8, 4, 2, 1],
        "window_positional_embedding_background_size": [8, 8],
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "vibevoice_acoustic_tokenizer": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "xcodec2": {"quantization_dim": 64, "encoder_hidden_size": 8},
    "bamba": {"attn_layer_indices": [1]},
    "clap_audio_model": {"spec_size": 64, "window_size": 2, "patch_embeds_hidden_size": 8},
    "clvp_encoder": {"use_rotary_embedding": False},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64]},
    "donut-swin": {"window_size": 2, "image_size": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lilt": {"hidden_size": 96},
    "rt_detr": {"encoder_in_channels": [64, 64, 64], "decoder_in_channels": [64, 64, 64]},
    "rt_detr_v2": {"encoder_in_channels": [64, 64, 64], "decoder_in_channels": [64, 64, 64]},
    "swin": {"window_size": 2, "image_size": 64},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [64, 64]},
    "xmod": {"default_language": "en_XX"},
    "blip-2": {"image_token_index": 200},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "gemma3": {"mm_tokens_per_image": 4},
    "instructblip": {"image_token_index": 200},
    "instructblipvideo": {"video_token_index": 200},
    "llama4_vision_model": {"intermediate_size": 256},
    "mimi": {"vector_quantization_hidden_dimension": 64},
    "paddleocr_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
    "pp_formulanet_vision": {"post_conv_in_channels": 64},
    "sam_vision_model": {"num_pos_feats": 32},
    "sam_hq_vision_model": {"num_pos_feats": 32},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "slanext_vision": {"post_conv_in_channels": 64},
    "step3p5": {"start": {"sliding_window": 8}},
    "superpoint": {"keypoint_decoder_dim": 65},
    "xlstm": {"qk_dim_factor": 1.0},
    "esmfold2": {
        "single_inputs_size": 131,
        "atom_encoder": _ATOMS,
        "structure_head": {"diffusion_module": {"atom_encoder": _ATOMS}},
    },
    "gemma4_assistant": {
        "start": {
            "text_config": {"model_type": "gemma4_text", **_NO_EXTRA_EMBEDDING, "num_kv_shared_layers": 30}
        },
        "text_config": _NO_EXTRA_EMBEDDING | {"num_kv_shared_layers": 2},
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "pp_ocrv5_server_det": _PADDLE_NECK,
    "pp_ocrv6_medium_det": _PADDLE_NECK,
    "pp_ocrv6_small_det": {
        "start": {
            "backbone_config": {
                "model_type": "pp_lcnet_v4",
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            }
        }
    },
    "align": {"projection_dim": 80},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "zoedepth": {"backbone_config": {"start": {"out_features": None}}},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "table-transformer": _DETR,
    "time_series_transformer": {"start": {"prediction_length": 8, "context_length": 16}},
    "wav2vec2-bert": {"start": {"vocab_size": 64}},
    "wav2vec2-conformer": {"start": {"vocab_size": 64}},
}

"""Tiny random models of every class behind AutoModelForImageTextToText, from their own configurations made small."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.support import tiny

MODEL_TYPES: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""model_type -> name of its class, as transformers has them."""
VOCABULARY, IMAGE, PAD = 64, 4, 3
WIDTH, HEADS, LAYERS = 32, 4, 2
SMALL = {
    **dict.fromkeys(["vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "embed_dim", "d_model", "out_hidden_size", "text_hidden_size"], WIDTH),
    **dict.fromkeys(["encoder_hidden_size", "projection_dim", "merged_hidden_size", "word_embed_proj_dim"], WIDTH),
    **dict.fromkeys(["projection_hidden_size", "patch_embed_hidden_size", "output_dim", "adapter_out_dim"], WIDTH),
    **dict.fromkeys(
        ["intermediate_size", "moe_intermediate_size", "ffn_dim", "mlp_dim", "dense_intermediate_size"], 64
    ),
    **dict.fromkeys(["alignment_intermediate_size", "projector_hidden_size", "projection_hidden_dim"], 64),
    **dict.fromkeys(["shared_expert_intermediate_size", "projection_intermediate_size", "share_expert_dim"], 64),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"], 64),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "depth", "n_layers", "resampler_depth"], LAYERS),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "num_heads", "resampler_n_heads", "attention_heads"], HEADS),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "index_n_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "resampler_head_dim", "swa_head_dim", "kv_lora_rank", "q_lora_rank"], 8),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"], 8),
    **dict.fromkeys(["n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "n_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    **dict.fromkeys(["image_size"], 28),
    **dict.fromkeys(["patch_size"], 7),
    **dict.fromkeys(["first_k_dense_replace"], 1),
    "swa_num_attention_heads": HEADS,
    "qk_head_dim": 16,
    "max_position_embeddings": 512,
    "num_position_embeddings": 64,
    "mrope_section": [1, 1, 2],
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "resampler_n_latents": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "initializer_range": 0.02,
    "sliding_window": 16,
}
"""Key of a configuration -> its value, wherever it stands and isn't None."""
HYBRID_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "rope_parameters": HYBRID_ROPE,
}
"""Layers of linear attention, as in Qwen3.5."""
WITH_3D = ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl")
TOPK = {"index_topk": 64}
SAM = {"output_channels": 16, "global_attn_indexes": [1], "window_size": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": HYBRID_ROPE}, "layer_types": ["full_attention"] * 2}
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
        "vision_config": {"sam_config": SAM | {"downsample_channels": [24, WIDTH]}},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": SAM},
    "dots3_note": {
        "text_config": TOPK
        | {"head_dim": 16, "num_key_value_heads": HEADS, "layer_types": ["indexed_attention", "sliding_attention"]},
        "audio_config": {"adapter_input_size": WIDTH},
        "vision_config": {"adapter_in_dim": WIDTH},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]},
            "moe_intermediate_size": [64, 32],
        }
    },
    "fast_vlm": {
        "vision_config": {
            "hidden_size": 128,
            "model_args": {"inference_mode": True, "layers": [1] * 5, "embed_dims": [64] * 5},
        }
    },
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "hidden_size": WIDTH,
            "model_args": {
                "embed_dim": WIDTH,
                "depth": 2,
                "num_heads": HEADS,
                "img_size": [28, 28],
                "patch_size": 7,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": [4, 4],
            },
        }
    },
    "gemma3n": {
        "vision_soft_tokens_per_image": 16,
        "vision_config": {
            "hidden_size": 2048,
            "model_args": {"channel_multiplier": 0.05, "msfa_output_resolution": 4},
        },
        "text_config": {
            "intermediate_size": [64, 64],
            "activation_sparsity_pattern": [0.95, 0.0],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
        "audio_config": {"conf_num_hidden_layers": 1},
    },
    "gemma4": {
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 7,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "text_config": {"hidden_size_per_layer_input": 8},
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "gemma4_unified": {
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 7,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
        }
    },
    "llava_next": {"image_grid_pinpoints": tiny.GRID_PINPOINTS},
    "ovis2": {"visual_indicator_token_ids": [6, 7, 8, 62, 63]},
    "llava_next_video": {"image_grid_pinpoints": tiny.GRID_PINPOINTS},
    "llava_onevision": {"image_grid_pinpoints": tiny.GRID_PINPOINTS},
    "vipllava": {"vision_feature_layer": [-2, 1]},
    "glm5_next": {
        "text_config": TOPK
        | {
            "num_key_value_heads": HEADS,
            "index_kpool": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "qk_head_dim": 8,
            "hc_mult": 2,
        }
    },
    "got_ocr2": {"vision_config": SAM},
    "granite4_vision": {
        "image_grid_pinpoints": tiny.GRID_PINPOINTS,
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [2, 3, 4, 5],
        "text_config": {"num_hidden_layers": 6},
    },
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": HYBRID_ROPE | {"mrope_section": [1, 1, 1, 1]}}},
    **{name: {"text_config": {"rope_parameters": HYBRID_ROPE | {"partial_rotary_factor": 1.0}}} for name in WITH_3D},
    "kimi_k25": {"text_config": {"num_key_value_heads": HEADS, "head_dim": 8}},
    "inkling_mm_model": {"text_config": {"logits_mup_width_multiplier": 1.0}},
    "janus": {
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1],
            "latent_channels": 8,
            "num_embeddings": 16,
            "num_res_blocks": 1,
            "image_token_embed_dim": 16,
        }
    },
    "llama4": {
        "text_config": {
            "intermediate_size_mlp": 64,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
        },
        "vision_config": {
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
            "intermediate_size": 128,
        },
    },
    "minicpm_ocr": {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}, "text_config": LINEAR},
    "minicpmv4_6": {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}, "text_config": LINEAR},
    "minicpmv4_7": {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}, "text_config": LINEAR},
    "minimax_m3_vl": {"merged_hidden_size": 128},
    "mistral_large4": {
        "text_config": TOPK
        | {
            "kv_source_layers": [0, 1],
            "num_key_value_heads": HEADS,
            "no_rope_layers": [1, 0],
            "layer_types": ["indexed_attention"] * 2,
        }
    },
    "molmo2": {
        "image_patch_id": IMAGE,
        "adapter_config": {"vision_feature_layer": [1, 0]},
        "text_config": {"rope_scaling_layers": [0, 1], "additional_vocab_size": 8},
    },
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        "text_config": {"moe_hidden_size": 32},
    },
    "nemotron_h_omni": {
        "vision_hidden_size": WIDTH,
        "vision_config": {"patch_dim": 147, "video_patch_dim": 294},
        "text_config": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
    },
    "qwen3_5": {"text_config": LINEAR},
    "qwen3_5_moe": {"text_config": LINEAR},
    "qwen4_exp": {
        "text_config": LINEAR
        | {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
            "ngram_vocab_size_base": 64,
        }
    },
    "qwen2_5_omni_thinker": {
        "text_config": {"rope_parameters": HYBRID_ROPE},
        "vision_start_token_id": 6,
        "vision_end_token_id": 7,
        "audio_start_token_id": 8,
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 6,
        "vision_end_token_id": 7,
        "audio_config": {"encoder_layers": 1, "downsample_hidden_size": 8},
    },
    "unlimited_ocr": {"vision_config": {"sam_config": SAM | {"downsample_channels": [24, WIDTH]}}},
}
"""Model type -> what SMALL doesn't make small or consistent."""
LISTS_OF_LAYERS = ("layer_types", "mlp_layer_types", "indexer_types")
SPECIAL = iter(())


WITHOUT_WEIGHTS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": IMAGE}},
    "emu3": {"vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 5}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}},
}
"""Model type -> settings without which the class can't be made of its default configuration."""


def model_without_weights(model_type: str) -> PreTrainedModel:
    """Model of a type's class and default configuration on the meta device."""
    with torch.device("meta"):
        config = CONFIG_MAPPING[model_type](**WITHOUT_WEIGHTS.get(model_type, {}))
        return getattr(transformers, MODEL_TYPES[model_type])(config)


def shrink(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Copy of a configuration's values with those of SMALL and then `overrides`, at every depth."""
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name not in ("per_layer_config",):
            small[name] = shrink(value, overrides.get(name) or {})
        elif name == "per_layer_config":
            small[name] = {}
        elif (
            value is not None
            and isinstance(SMALL.get(name), int)
            and isinstance(value, list)
            and name not in LISTS_OF_LAYERS
        ):
            small[name] = [SMALL[name]] * len(value)
        elif value is not None and name in SMALL:
            small[name] = SMALL[name]
        elif name in LISTS_OF_LAYERS and value:
            small[name] = layer_kinds(value)
        else:
            small[name] = value
    small |= {
        name: value
        for name, value in overrides.items()
        if not isinstance(small.get(name), dict) or not isinstance(value, dict)
    }
    kinds = [len(small[name]) for name in LISTS_OF_LAYERS if small.get(name)]
    if kinds and "num_hidden_layers" in small:
        small["num_hidden_layers"] = max(kinds)
        for name in LISTS_OF_LAYERS:
            if small.get(name):
                small[name] = (small[name] + [small[name][-1]] * max(kinds))[: max(kinds)]
    return small


def layer_kinds(kinds: list[str]) -> list[str]:
    """Each kind of layer once, at least two layers."""
    once = list(dict.fromkeys(kinds))
    return once if len(once) > 1 else once * 2


def with_token_ids(values: dict[str, Any]) -> dict[str, Any]:
    """Special tokens within the vocabulary: image tokens are IMAGE, the others are counted up."""
    free = iter([6, 7, 8, 59, 60, 61, 62, 63])
    ids = {}
    for name, value in values.items():
        if name in ("image_token_id", "image_token_index"):
            ids[name] = IMAGE
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and name not in SMALL:
            ids[name] = next(free)
    return values | ids


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Small configuration of a model type."""
    config_class = CONFIG_MAPPING[model_type]
    values = shrink(config_class().to_dict(), OVERRIDES.get(model_type, {}))
    return config_class.from_dict(with_token_ids(values) | {"dtype": "float32"})


def tiny_model(model_type: str) -> PreTrainedModel:
    """Random model of a model type's class."""
    torch.manual_seed(0)
    model = tiny.spread(getattr(transformers, MODEL_TYPES[model_type])(tiny_config(model_type)))
    # What is initialised to 0, or scaled down to nothing, would hide the images.
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
        elif "timm_model" in name and parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter)
        elif name.endswith(("gamma", "layer_scale")):
            torch.nn.init.ones_(parameter)
    return model

"""Families of VLMs: one record each for what differs between them.

Everything else follows the conventions of transformers' VLMs: `get_image_features`, a forward that takes
`mm_encoder_outputs` and `logits_to_keep`, `get_decoder`, and `config.image_token_id`. A family that keeps to them needs
no record: `conventional` finds its modules by their usual names.
"""

from dataclasses import replace

from transformers import PreTrainedModel

from dualspeed.errors import ModelError
from dualspeed.method.vlm import blank_images, token_counts
from dualspeed.method.vlm.encoder import body
from dualspeed.method.vlm.family import Family

CAPTURED_FIELDS = ("cls_attention", "keys", "pre_projection")
"""Fields of VisualTokens that are captured during the forward of a readable tower."""


LLAVA = Family(
    layers="encoder.layers",
    unused=("post_layernorm", "head"),
    selects_layer=True,
    has_readable_tower=True,
    projects_single_patches=True,
    has_tile_budget=True,
)
# Their features are the tower's last hidden state, after `post_layernorm`.
SIGLIP = Family(layers="encoder.layers", unused=("head",), has_readable_tower=True)
IDEFICS3 = Family(
    tower="model.vision_model",
    layers="encoder.layers",
    projector=("model.connector",),
    has_readable_tower=True,
    splits_samples_into_tiles=True,
    has_tile_budget=True,
    blank_image=blank_images.tile_of_ones,
)
QWEN_VL = Family(
    tower="model.visual",
    layers="blocks",
    projector=("model.visual.merger",),
    has_readable_tower=True,
    merges_patches=True,
    takes_any_squares=True,
    has_3d_positions=True,
    blank_image=blank_images.patches_of_one_token,
)

QWEN3_VL = replace(QWEN_VL, projector=("model.visual.merger", "model.visual.deepstack_merger_list"))

GLM = Family(
    tower="model.visual",
    projector=("model.visual.merger",),
    has_3d_positions=True,
    blank_image=blank_images.patches_of_one_token,
)
Q_FORMER = Family(
    tower="vision_model",
    projector=("qformer", "query_tokens", "language_projection"),
    runs="language_model",
    blank_image=blank_images.square_and_question,
)

FAMILIES: dict[str, Family] = {
    "blip-2": replace(Q_FORMER, blank_image=blank_images.square),
    "instructblip": Q_FORMER,
    "deepseek_vl_hybrid": Family(
        tower="model.vision_model",
        further_towers=("model.high_res_vision_model",),
        unused=("head",),
        projector=("model.aligner",),
        blank_image=blank_images.square_in_two_resolutions,
    ),
    "deepseek_ocr2": Family(
        projector=("model.multi_modal_projector", "model.view_separator"),
        conditional=("query_768_resolution", "query_1024_resolution"),
    ),
    "ernie4_5_vl_moe": Family(
        projector=("model.resampler_model",),
        conditional=(".vision_moe.",),
        has_3d_positions=True,
        blank_image=blank_images.patches_of_one_token,
    ),
    "nemotron_h_omni": Family(
        tower="vision_model",
        unused=("embeddings.video_patch_projection",),
        projector=("multi_modal_projector", "vision_final_layernorm"),
        blank_image=blank_images.patches_in_rows,
    ),
    "minicpm_ocr": Family(
        projector=("model.merger",),
        ignored=("model.vision_tower.vit_merger",),
        blank_image=blank_images.patches_in_strip,
    ),
    "fast_vlm": Family(blank_image=blank_images.small_square),
    "gemma3n": Family(
        projector=("model.embed_vision",),
        ignored=("model.audio_tower", "model.embed_audio"),
        blank_image=blank_images.small_square,
    ),
    "perception_lm": Family(blank_image=blank_images.square_of_tiles),
    "aria": Family(layers="encoder.layers", unused=("post_layernorm",)),
    "gemma4": Family(
        projector=("model.embed_vision",),
        ignored=("model.audio_tower", "model.embed_audio"),
        blank_image=blank_images.patches_with_positions,
    ),
    "glm46v": GLM,
    "glm4v": GLM,
    "glm4v_moe": GLM,
    "got_ocr2": Family(),
    "lfm2_vl": Family(unused=("head",), blank_image=blank_images.patches_with_shape),
    "molmo2": Family(blank_image=blank_images.crop_and_pooling),
    "ovis2": Family(projector=("model.visual_embeddings_table",), carried=("visual_indicator_features",)),
    "shieldgemma2": SIGLIP,
    "cohere2_vision": SIGLIP,
    "aya_vision": replace(LLAVA, projects_single_patches=False, has_tile_budget=False),
    "granite4_vision": Family(
        unused=("post_layernorm",),
        projector=("model.layerwise_projectors", "model.spatial_projectors", "model.image_newline"),
        has_layered_features=True,
        blank_image=blank_images.square_in_tiles,
    ),
    "janus": Family(
        tower="model.vision_model",
        projector=("model.aligner",),
        ignored=("model.vqmodel", "model.generation_embeddings", "model.generation_aligner", "model.generation_head"),
    ),
    "llama4": Family(
        tower="vision_model",
        projector=("multi_modal_projector",),
        features="last_hidden_state",
        projects_later=True,
        runs="language_model",
    ),
    "hunyuan_vl": Family(
        projector=("model.vision_tower.patch_merger",),
        has_3d_positions=True,
        num_placeholders=token_counts.of_grid_with_separators,
        has_rows_of_pixels=False,
        ignored=("model.vision_tower.patch_merger.image_sep",),
        blank_image=blank_images.patches_of_one_token,
    ),
    "granite_docling": Family(
        tower="model.vision_model",
        projector=("model.vision_model.connector",),
        ignored=("model.vision_model.connector.fine", "model.density_router"),
        refused_inputs=("tile_fine_mask",),
        carried=("router_logits",),
        splits_samples_into_tiles=True,
        tokens_of_tile=token_counts.of_fine_or_coarse_tile,
        blank_image=blank_images.tile_with_mask,
    ),
    "idefics2": Family(
        tower="model.vision_model",
        projector=("model.connector",),
        splits_samples_into_tiles=True,
        tokens_of_tile=token_counts.of_latents,
        blank_image=blank_images.tile_of_ones,
    ),
    "inkling2": Family(
        projector=("model.vision_tower.merger",),
        num_placeholders=token_counts.of_grid,
        blank_image=blank_images.square_of_patches,
    ),
    "inkling_mm_model": Family(
        ignored=("model.audio_tower",),
        projector=("model.vision_tower",),
        tower="",
        encodes_tokens_alone=True,
        blank_image=blank_images.patch_in_time,
    ),
    "kimi_k25": Family(projector=("model.mm_projector",), blank_image=blank_images.unflattened_patches),
    "paddleocr_vl": Family(
        tower="model.visual",
        projector=("model.projector",),
        has_3d_positions=True,
        blank_image=blank_images.unflattened_patches,
    ),
    "fuyu": Family(
        tower="",
        projector=("model.vision_embed_tokens",),
        features="last_hidden_state",
        blank_image=blank_images.patches_alone,
    ),
    "gemma4_unified": Family(
        tower="", projector=("model.embed_vision",), blank_image=blank_images.patches_with_positions
    ),
    "gemma3": SIGLIP,
    "idefics3": IDEFICS3,
    "internvl": Family(layers="encoder.layer", has_readable_tower=True),
    "llava": replace(LLAVA, packs_rows=True),
    "llava_next": Family(
        layers="encoder.layers",
        unused=("post_layernorm", "head"),
        projector=("model.multi_modal_projector", "model.image_newline"),
        selects_layer=True,
        has_readable_tower=True,
        projects_single_patches=True,
        packing_settings=("vision_feature_select_strategy",),
        has_tile_budget=True,
        blank_image=blank_images.square_in_tiles,
        packs_rows=True,
    ),
    "llava_onevision": Family(
        layers="encoder.layers",
        unused=("post_layernorm", "head"),
        projector=("model.multi_modal_projector", "model.image_newline"),
        selects_layer=True,
        has_readable_tower=True,
        packing_settings=("vision_aspect_ratio",),
        blank_image=blank_images.square_in_tiles,
        packs_rows=True,
    ),
    "mistral3": Family(layers="transformer.layers", blank_image=blank_images.two_by_two_tokens),
    "paligemma": SIGLIP,
    "qwen2_5_vl": replace(QWEN_VL, orders_by_window=True, packs_rows=True),
    "qwen2_vl": replace(QWEN_VL, packs_rows=True),
    "qwen3_5": QWEN_VL,
    "qwen3_5_moe": QWEN_VL,
    "qwen3_vl": replace(QWEN3_VL, packs_rows=True),
    "qwen3_vl_moe": QWEN3_VL,
    "smolvlm": replace(IDEFICS3, casts_features=True),
    "vipllava": Family(
        layers="encoder.layers",
        unused=("post_layernorm", "head"),
        selects_layer=True,
        drops_first_position=True,
        has_readable_tower=True,
    ),
}
"""config.model_type -> family."""
ENCODER_DECODER = "it is an encoder-decoder, whose decoder reads images by cross-attention"
NO_PLACEHOLDERS = "its sequence has no image placeholders"
DISCRETE = "its images are discrete tokens of the vocabulary, without a projector"
REFUSED: dict[str, str] = {
    **dict.fromkeys(["blip", "florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop"], ENCODER_DECODER),
    "vision-encoder-decoder": ENCODER_DECODER,
    "idefics": f"{NO_PLACEHOLDERS}: its layers read images by cross-attention",
    "mllama": f"{NO_PLACEHOLDERS}: its layers read images by cross-attention",
    "evolla": f"{NO_PLACEHOLDERS}: it reads proteins, by cross-attention",
    "git": f"{NO_PLACEHOLDERS}: images stand before it, whatever it says",
    "kosmos-2": f"{NO_PLACEHOLDERS}: a mask beside it says where images stand",
    "kosmos-2.5": f"{NO_PLACEHOLDERS}: a mask beside it says where images stand",
    "instructblipvideo": f"{NO_PLACEHOLDERS}, but those of videos",
    "mistral4": f"{NO_PLACEHOLDERS}: it is a language model alone",
    "chameleon": DISCRETE,
    "emu3": DISCRETE,
    "diffusion_gemma": "it generates text by diffusion, not token by token",
    "pi0": "it has no text output: it predicts a robot's actions",
}
"""config.model_type -> why no training on pruned tokens is possible, for models that transformers lists as VLMs."""
CONVENTIONAL_TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")


def family_of(vlm: PreTrainedModel) -> Family:
    """Record of a model's family, or one made by `conventional`."""
    return FAMILIES.get(vlm.config.model_type) or conventional(vlm)


def is_listed(vlm: PreTrainedModel) -> bool:
    """True if the model's family has a record of its own."""
    return vlm.config.model_type in FAMILIES


def conventional(vlm: PreTrainedModel) -> Family:
    """Record of a family that has none: modules are found by the names that transformers' VLMs share.

    A merger inside the tower belongs to the projector, as does whatever is part of neither tower nor language model.
    """
    prefix = "model." if hasattr(vlm, "model") else ""
    children = dict(body(vlm).named_children())
    tower = next((name for name in CONVENTIONAL_TOWERS if name in children), CONVENTIONAL_TOWERS[0])
    inside = dict(children[tower].named_children()) if tower in children else {}
    has_layers = "encoder" in inside and hasattr(inside["encoder"], "layers")
    selects = has_layers and hasattr(vlm.config, "vision_feature_layer")
    return Family(
        tower=f"{prefix}{tower}",
        layers="encoder.layers" if has_layers else "",
        unused=("head", "post_layernorm") if selects else ("head",),
        projector=tuple(f"{prefix}{tower}.{name}" for name in inside if "merger" in name),
        ignored=tuple(f"{prefix}{name}" for name in children if "audio" in name or "video" in name),
        has_3d_positions=hasattr(body(vlm), "compute_3d_position_ids"),
        blank_image=blank_images.conventional,
    )


def check_pixel_pruning(vlm: PreTrainedModel, tolerance: float | None) -> None:
    """Raise ModelError if `pixel_pruning` is set for a model whose tower takes whole images, or squares, only."""
    if tolerance is not None and not family_of(vlm).takes_any_squares:
        others = [name for name, family in FAMILIES.items() if family.takes_any_squares]
        raise ModelError(
            f"pixel_pruning {tolerance:g} leaves patches of an image out of the vision tower, and that of "
            f"{type(vlm).__name__} takes whole images; valid: null, or a model of {', '.join(others)}"
        )


def check_clip_tower(vlm: PreTrainedModel, clip_width: int, folder: str) -> None:
    """Raise ModelError unless CLIP's projection fits what the projector takes: single patches of a tower like CLIP's.

    Args:
        clip_width: width of the vision tower of the CLIP in `folder`.
    """
    vision = vlm.config.vision_config
    is_clip = vision.model_type == "clip_vision_model" and vision.hidden_size == clip_width
    if not (is_clip and family_of(vlm).projects_single_patches):
        raise ModelError(
            f"relevance_clip: {folder} projects patches of a CLIP tower of width {clip_width}, which those of "
            f"{type(vlm).__name__} with a {vision.model_type} of width {vision.hidden_size} are not; without "
            "relevance_clip the language model's own embeddings serve any model"
        )

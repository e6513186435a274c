"""Parts of every family's model: what each stage trains, in which optimizer group and at which learning rate."""

import pytest
import torch
from transformers import TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedModel, DualSpeedTrainer, Mode
from dualspeed.method.vlm.families import FAMILIES as RECORDS
from dualspeed.method.vlm.families import conventional
from dualspeed.training.trainable import parts_of, set_trainable
from tests.support import tiny
from tests.support.families import Family, batch
from tests.support.first_rank import ALL_FAMILIES as FAMILIES

by_family = pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
LANGUAGE = {"model.language_model": "language", "lm_head": "language"}
TEXT_MODEL = {"model.text_model": "language", "lm_head": "language"}
LLAVA = LANGUAGE | {"model.vision_tower": "vision", "model.multi_modal_projector": "projector"}
SELECTED_LAST_BUT_ONE = {
    "model.vision_tower.encoder.layers.2": "unused",
    "model.vision_tower.post_layernorm": "unused",
}
QWEN = LANGUAGE | {"model.visual": "vision", "model.visual.merger": "projector"}
IDEFICS = TEXT_MODEL | {"model.vision_model": "vision", "model.connector": "projector"}
# Family -> {prefix of parameter names: part}; the longest prefix counts.
EXPECTED = {
    "LLaVA-1.5": LLAVA | SELECTED_LAST_BUT_ONE,
    "LLaVA-NeXT": LLAVA | SELECTED_LAST_BUT_ONE | {"model.image_newline": "projector"},
    "LLaVA-OneVision": LLAVA
    | {
        "model.image_newline": "projector",
        "model.vision_tower.post_layernorm": "unused",
        "model.vision_tower.head": "unused",
    },
    "VipLLaVA": LLAVA | SELECTED_LAST_BUT_ONE,
    "InternVL": LLAVA,
    "Qwen2-VL": QWEN,
    "Qwen2.5-VL": QWEN,
    "Qwen3-VL": QWEN | {"model.visual.deepstack_merger_list": "projector"},
    "Idefics3": IDEFICS,
    "SmolVLM": IDEFICS,
    "Gemma 3": LLAVA,
    "PaliGemma": LLAVA,
    "Mistral 3": LLAVA,
    "Qwen3.5": QWEN,
    "Qwen3.5 MoE": QWEN,
    "Qwen3-VL MoE": QWEN | {"model.visual.deepstack_merger_list": "projector"},
    "Gemma 4": LLAVA | {"model.embed_vision": "projector"},
    "GLM-4.1V": QWEN,
    "GLM-4.5V": QWEN,
    "GLM-4.6V": QWEN,
    "LFM2-VL": LLAVA | {"model.vision_tower.head": "unused"},
    "Aya Vision": LLAVA | {"model.vision_tower.post_layernorm": "unused"},
    "Command A Vision": LLAVA | {"model.vision_tower.head": "unused"},
    "Aria": LLAVA | {"model.vision_tower.post_layernorm": "unused"},
    "GOT-OCR 2.0": LLAVA,
    "Ovis 2": LLAVA | {"model.visual_embeddings_table": "projector"},
    "Idefics2": IDEFICS,
    "Molmo 2": LLAVA,
    "Perception LM": LLAVA,
    "PaliGemma 2": LLAVA,
    "InternVL3.5": LLAVA,
}
STAGES = {
    "pretrain": ("pretrain", False, {"projector"}),
    "finetune": ("finetune", False, {"projector", "language"}),
    "finetune with vision": ("finetune", True, {"projector", "language", "vision"}),
}
LEARNING_RATES = {"model": 1e-3, "projector": 2e-3, "vision": 3e-3}


def model_of(family: Family) -> DualSpeedModel:
    torch.manual_seed(0)
    return DualSpeedModel(family.build(), DualSpeedConfig(pruning_ratio=0.5))


def expected_parts(family: Family, model: DualSpeedModel) -> dict[str, str]:
    """Part of each parameter by the table above."""

    def part(name: str) -> str:
        if name == "mode_isolator.weight":
            return "projector"
        prefixes = [prefix for prefix in EXPECTED[family.name] if f"{name}.".startswith(f"vlm.{prefix}.")]
        return EXPECTED[family.name][max(prefixes, key=len)]

    return {name: part(name) for name, _ in model.named_parameters()}


def trainer_of(model: DualSpeedModel, folder, with_vision: bool) -> DualSpeedTrainer:
    arguments = TrainingArguments(str(folder), learning_rate=LEARNING_RATES["model"], weight_decay=0.1, use_cpu=True)
    return DualSpeedTrainer(
        model=model,
        args=arguments,
        projector_learning_rate=LEARNING_RATES["projector"],
        vision_learning_rate=LEARNING_RATES["vision"] if with_vision else None,
    )


@by_family
def test_every_parameter_belongs_to_one_part(family):
    model = model_of(family)
    assert parts_of(model) == expected_parts(family, model)


@by_family
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_its_parts_in_their_groups_at_their_rates(family, stage, tmp_path):
    name, with_vision, trained_parts = STAGES[stage]
    model = model_of(family)
    set_trainable(model, name, with_vision)
    expected = {name: part for name, part in expected_parts(family, model).items() if part in trained_parts}
    parameters = dict(model.named_parameters())
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == set(expected)

    groups = trainer_of(model, tmp_path, with_vision).create_optimizer().param_groups
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(group_of) == len(expected)
    for parameter_name, part in expected.items():
        group = group_of[parameters[parameter_name]]
        wanted = "model" if part == "language" else part
        assert group["name"] in (wanted, f"{wanted}_no_decay"), parameter_name
        assert group["lr"] == LEARNING_RATES[wanted], parameter_name
        assert group["weight_decay"] == (0.0 if group["name"].endswith("_no_decay") else 0.1)
    assert group_of[model.mode_isolator.weight]["name"] == "projector_no_decay"

    model(mode=Mode.SLOW, **batch(family, [1])).loss.backward()
    assert not [name for name in expected if parameters[name].grad is None]
    assert not [name for name, parameter in parameters.items() if name not in expected and parameter.grad is not None]


@by_family
def test_a_family_without_a_record_goes_by_conventions(family, monkeypatch):
    """Its parts are those of the record."""
    model = model_of(family)
    monkeypatch.setattr("dualspeed.method.vlm.families.FAMILIES", {})
    assert parts_of(model) == expected_parts(family, model)


def test_conventions_leave_audio_alone():
    vlm = tiny.llava()
    vlm.model.audio_tower = torch.nn.Linear(2, 2)
    assert conventional(vlm).ignored == ("model.audio_tower",)


def test_towers_that_select_hidden_states_leave_head_and_final_norm_unused():
    model = DualSpeedModel(tiny.llava_siglip(), DualSpeedConfig())
    unused = {
        name.removeprefix("vlm.model.vision_tower.") for name, part in parts_of(model).items() if part == "unused"
    }
    assert {name.split(".")[0] for name in unused} == {"encoder", "post_layernorm", "head"}
    assert all(name.startswith("encoder.layers.2.") for name in unused if name.startswith("encoder."))


def test_tied_embeddings_are_language():
    paligemma = next(family for family in FAMILIES if family.name == "PaliGemma")
    vlm = paligemma.build()
    assert vlm.get_output_embeddings().weight is vlm.get_input_embeddings().weight
    model = DualSpeedModel(vlm, DualSpeedConfig())
    assert [part for name, part in parts_of(model).items() if "embed_tokens" in name] == ["language"]


def test_every_family_that_is_tested_has_a_record():
    assert {family.build().config.model_type for family in FAMILIES} <= set(RECORDS)

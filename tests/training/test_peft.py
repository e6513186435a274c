"""The four ways to adapters of peft: each trains, resumes, and saves the merged stock checkpoint, them beside it."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText
from transformers.trainer_utils import validate_quantization_for_training

from dualspeed import DualSpeedConfig, DualSpeedModel, DualSpeedTrainer, LoraRecipe, add_adapters
from dualspeed.errors import ConfigError
from dualspeed.trl import DualSpeedSFTTrainer
from tests.support.sft import FAMILY, make_sft, rows
from tests.support.stock import make
from tests.support.tiny_chat import tiny_parts

MIXED = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**given) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": TARGETS} | given))


def by_add_adapter(model):
    model.add_adapter(lora())
    return model


def by_ours(model):
    add_adapters(model, LoraRecipe(rank=4, alpha=8, dropout=0.1))
    return model


def sft(folder, change=lambda model: model, **given):
    return make_sft(DualSpeedSFTTrainer, folder, dualspeed=MIXED, model=change, **given)


def plain(folder, change):
    from dualspeed import ConversationCollator

    def made(**given):
        model, processor = tiny_parts(FAMILY)
        own = {"train_dataset": rows("messages"), "data_collator": ConversationCollator(processor)}
        return make(DualSpeedTrainer, folder, change(model), dualspeed=MIXED, learning_rate=1e-2, **own, **given)

    return made


WAYS = {
    "get_peft_model": lambda folder, **given: plain(folder, lambda model: get_peft_model(model, lora()))(**given),
    "a named adapter": lambda folder, **given: sft(
        folder, lambda model: get_peft_model(model, lora(use_rslora=True), adapter_name="mine"), **given
    ),
    "peft_config": lambda folder, **given: sft(
        folder, peft_config=lora(target_modules="all-linear", exclude_modules=["lm_head"]), **given
    ),
    "add_adapter": lambda folder, **given: plain(folder, by_add_adapter)(**given),
    "add_adapters": lambda folder, **given: plain(folder, by_ours)(**given),
}
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def made(way, folder, **given):
    torch.manual_seed(0)  # peft draws an adapter's first weights
    return WAYS[way](folder, **given)


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.slow if way in ("get_peft_model", "add_adapters") else ()) for way in WAYS],
)
def test_adapters_train_resume_and_are_merged(tmp_path, caplog, way):
    with caplog.at_level(logging.INFO, "dualspeed"):
        whole = made(way, tmp_path / "whole", **SAVING)
        whole.train()
        whole.save_model(str(tmp_path / "out"))
    assert "save_model writes the merged model, and adapter/ beside it" in caplog.text
    assert f"{tmp_path / 'out'}: the stock model with its adapters merged in" in caplog.text

    resumed = made(way, tmp_path / "resumed", **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), atol=0, rtol=0)

    vlm = whole.model.eval().vlm
    base, _ = tiny_parts(FAMILY)
    batch = {name: value for name, value in whole.data_collator(list(whole.train_dataset)).items() if name != "labels"}
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert merged.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():
        adapted = vlm(**batch).logits
        assert_close(merged(**batch).logits, adapted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(base.eval()(**batch).logits, adapted, atol=1e-3)
        base.load_state_dict(load_file(tmp_path / "out" / "adapter" / "projector.safetensors"), strict=False)
        by_peft = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
        assert_close(by_peft(**batch).logits, adapted, atol=1e-5, rtol=1e-5)
    assert DualSpeedModel.from_pretrained(tmp_path / "out").mode_isolator is not None
    assert not any("lora" in name for name in json.loads((tmp_path / "out" / "config.json").read_text()))


REFUSED = {
    "two adapters": (lambda model: two_adapters(model), "2 of them .*valid: one"),
    "no LoRA": (lambda model: get_peft_model(model, IA3Config(target_modules=TARGETS, feedforward_modules=[])), "IA3"),
    "a learned prompt": (
        lambda model: get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
        "PROMPT_TUNING",
    ),
    "DoRA": (lambda model: get_peft_model(model, lora(use_dora=True)), "use_dora is True.*valid: False"),
    "biases": (lambda model: get_peft_model(model, lora(bias="all")), "bias is 'all'.*valid: 'none'"),
    "whole modules": (
        lambda model: get_peft_model(model, lora(modules_to_save=["lm_head"])),
        "modules_to_save is .*valid: None",
    ),
    "embeddings": (lambda model: get_peft_model(model, lora(target_modules=["embed_tokens"])), "embed_tokens is Embed"),
}


def test_a_dualspeed_model_takes_a_peft_model():
    model, _ = tiny_parts(FAMILY)
    made = DualSpeedModel(get_peft_model(model, lora()), MIXED)
    assert made.vlm is model and made.has_adapters


def test_a_quantised_model_with_adapters_of_ours_may_be_trained():
    model, _ = tiny_parts(FAMILY)
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    validate_quantization_for_training(by_ours(model))


def two_adapters(model):
    model = get_peft_model(model, lora())
    model.add_adapter("other", lora())
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_cannot_be_merged_are_refused_at_the_start(tmp_path, name):
    change, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as raised:
        plain(tmp_path, change)()
    assert "\n" not in str(raised.value)

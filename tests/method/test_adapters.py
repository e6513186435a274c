"""LoRA: trainable parameters, saved files, and equality of resumed and uninterrupted runs."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.errors import ConfigError
from dualspeed.method.adapters import adapter_layers, add_adapters, quantization
from dualspeed.method.checkpoint import load_vlm
from dualspeed.settings.model import Stages
from dualspeed.settings.recipe import LoraRecipe
from dualspeed.settings.stage import StageSettings
from dualspeed.training.stage import train
from dualspeed.training.trainable import set_trainable
from tests.support import tiny
from tests.support.batches import collate, sample
from tests.support.stage import stage_settings, train_stage
from tests.support.tiny_images import batch as tiny_batch
from tests.support.tiny_models import tiny_model

LORA = LoraRecipe(rank=4, alpha=8, dropout=0.1)


def lora_settings(**arguments) -> StageSettings:
    chosen = stage_settings()
    recipe = dataclasses.replace(chosen.recipe, lora=LORA)
    recipe.training_arguments.update(arguments)
    return dataclasses.replace(chosen, recipe=recipe)


def adapted(**config) -> DualSpeedModel:
    model = DualSpeedModel(tiny.llava(**config), DualSpeedConfig(pruning_ratio=0.5))
    torch.manual_seed(1)
    add_adapters(model.vlm, LORA)
    set_trainable(model, "finetune")
    # As if trained: an untrained adapter's product is 0.
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def trained(stage_inputs, tmp_path_factory):
    return train_stage(stage_inputs, tmp_path_factory.mktemp("lora"), lora_settings())


def test_adapters_projector_and_isolator_are_trained():
    names = {name for name, parameter in adapted().named_parameters() if parameter.requires_grad}
    lora = {name for name in names if ".lora_" in name}
    assert all(name.startswith("vlm.model.language_model.layers.") for name in lora)
    assert len(lora) == 2 * 2 * 7  # two matrices for each of seven linear layers in each of two blocks
    rest = {name.split(".")[-3] if "projector" in name else name for name in names - lora}
    assert rest == {"multi_modal_projector", "mode_isolator.weight"}


def test_training_moves_the_language_model_by_its_adapters_alone(stage_inputs, trained):
    before, after = load_file(stage_inputs / "base" / "model.safetensors"), load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in moved)
    assert not [name for name in moved if "vision_tower" in name or "embed_tokens" in name or "lm_head" in name]
    assert (trained / "mode_isolator.safetensors").exists()
    assert "lora" in json.loads((trained / "training.json").read_text())["settings"]["recipe"]


def test_merged_checkpoint_is_the_adapted_model(tmp_path):
    model = adapted().eval()
    model.save_pretrained(tmp_path)
    batch = collate([sample("llava", seed, 1) for seed in range(3)])
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not any("lora" in name for name in stock.state_dict())
    assert_close(stock(**batch).logits, model.vlm(**batch).logits, atol=1e-5, rtol=1e-5)
    again = DualSpeedModel.from_pretrained(tmp_path)
    assert_close(again(mode=Mode.FAST, **batch).loss, model(mode=Mode.FAST, **batch).loss, atol=1e-5, rtol=1e-5)


def test_adapter_folder_is_peft_s(stage_inputs, trained):
    """Loaded by peft onto the base with the trained projector, the adapter equals the merged checkpoint."""
    base = load_vlm(stage_inputs / "base")
    missing, unexpected = base.load_state_dict(load_file(trained / "adapter" / "projector.safetensors"), strict=False)
    assert not unexpected
    assert all("multi_modal_projector" not in name for name in missing)
    by_peft = PeftModel.from_pretrained(base, trained / "adapter").eval()
    batch = collate([sample("llava", seed, 1) for seed in range(3)])
    stock = AutoModelForImageTextToText.from_pretrained(trained)
    assert_close(by_peft(**batch).logits, stock(**batch).logits, atol=1e-5, rtol=1e-5)


def test_resumed_equals_uninterrupted(stage_inputs, trained, tmp_path, monkeypatch):
    """Stopped after the checkpoint of step 4, with dropout."""

    def stop_in_step_5(callback, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("dualspeed.training.callbacks.MetricLogCallback.on_step_begin", stop_in_step_5)
        with pytest.raises(KeyboardInterrupt):
            train_stage(stage_inputs, tmp_path, lora_settings())
    assert not (tmp_path / "out").exists()
    (checkpoint,) = tmp_path.glob("state/*/checkpoints/checkpoint-4")
    assert (checkpoint / "adapter").is_dir()
    assert not list(checkpoint.glob("model*.safetensors"))  # only the end of training writes the whole model
    train(lora_settings(), stage_inputs / "base", stage_inputs / "data", tmp_path / "state", tmp_path / "out")
    for file in ("model.safetensors", "mode_isolator.safetensors", "adapter/adapter_model.safetensors"):
        whole, resumed = load_file(trained / file), load_file(tmp_path / "out" / file)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), file


def test_qlora_loads_the_model_in_four_bits():
    arguments = quantization(LoraRecipe(quantize=True))
    config = arguments["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert arguments["dtype"] == config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization(LORA) == quantization(None) == {}


def test_pretraining_has_no_adapters():
    recipe = lora_settings().recipe
    with pytest.raises(ConfigError, match=r"pretrain\.lora: the language model isn't trained there"):
        Stages(pretrain=recipe, finetune=recipe)


@pytest.mark.parametrize("lora", [False, True])
def test_tied_embeddings_stay_tied(tmp_path, lora):
    vlm = tiny.llava()
    vlm.config.tie_word_embeddings = vlm.config.text_config.tie_word_embeddings = True
    vlm.tie_weights()
    model = DualSpeedModel(vlm, DualSpeedConfig(pruning_ratio=0.5))
    if lora:
        add_adapters(vlm, LORA)
    set_trainable(model, "finetune")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = collate([sample("llava", seed, 1) for seed in range(2)])
    for mode in Mode:
        model(mode=mode, **batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    stock = load_vlm(tmp_path)
    assert stock.lm_head.weight is stock.get_input_embeddings().weight
    assert_close(stock(**batch).logits, vlm(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_trains_in_both_modes(lora):
    """bfloat16 losses equal float32 ones up to 8 bits; only the losses are computed in float32."""
    wide, narrow = (DualSpeedModel(tiny.llava().to(dtype), DualSpeedConfig()) for dtype in (None, torch.bfloat16))
    narrow.load_state_dict(wide.state_dict())
    if lora:
        add_adapters(narrow.vlm, LORA)
    set_trainable(narrow, "finetune")
    batch = collate([sample("llava", seed, 1) for seed in range(4)])
    for mode in Mode:
        output = narrow(mode=mode, **batch | {"pixel_values": batch["pixel_values"].bfloat16()})
        assert_close(output.ce_loss.float(), wide(mode=mode, **batch).ce_loss, atol=0.05, rtol=0.05)
        output.loss.backward()
    gradients = [p.grad for p in narrow.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


MIXTURES = ["glm4v_moe", "llama4", "qwen3_5_moe", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "aria"]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_and_routers_stay_frozen_in_every_mixture(model_type):
    """Whatever names peft knows them by; shared experts and attention are adapted, with the dropout asked for."""
    stock = tiny_model(model_type)
    decoder = set(stock.get_decoder().modules())
    linear = {name for name, module in stock.named_modules() if type(module) is torch.nn.Linear and module in decoder}
    linear = {name for name in linear if not name.endswith("lm_head")}
    vlm = tiny_model(model_type)
    add_adapters(vlm, LORA)
    layers = adapter_layers(vlm)
    assert layers.keys() == linear
    assert {type(layer).__name__ for layer in layers.values()} == {"Linear"}
    assert all(layer.lora_dropout["default"].p == LORA.dropout for layer in layers.values())
    frozen = {name for name, p in vlm.named_parameters() if not p.requires_grad}
    assert any(name.endswith("experts.gate_up_proj") for name in frozen)
    assert any("router" in name or name.endswith("gate.weight") for name in frozen)


def test_an_adapter_of_a_mixture_names_for_peft_what_was_trained(tmp_path):
    """Peft reads `gate_proj` of GLM-4.5V as its experts', so the shared experts' are named by their weights."""
    vlm = tiny_model("glm4v_moe")
    add_adapters(vlm, LORA)
    DualSpeedModel(vlm, DualSpeedConfig()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    by_weight = {name.removesuffix(".weight") for name in saved["target_parameters"]}
    shared = {name for name in adapter_layers(vlm) if not name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))}
    assert by_weight == shared and any("shared_experts.gate_proj" in name for name in shared)
    by_peft = PeftModel.from_pretrained(tiny_model("glm4v_moe"), tmp_path / "adapter").get_base_model()
    assert adapter_layers(by_peft).keys() == adapter_layers(vlm).keys()


def test_adapters_by_peft_of_a_mixture_s_attention_are_merged(tmp_path):
    vlm = tiny_model("glm4v_moe").eval()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = DualSpeedModel(get_peft_model(vlm, config), DualSpeedConfig())
    model.save_pretrained(tmp_path)
    inputs = tiny_batch(vlm, [1, 2, 0])
    merged, base = AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), tiny_model("glm4v_moe").eval()
    assert not torch.allclose(base(**inputs).logits, vlm(**inputs).logits, atol=1e-3)
    assert_close(merged(**inputs).logits, vlm(**inputs).logits, atol=1e-5, rtol=1e-5)
    by_peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(by_peft(**inputs).logits, vlm(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "given", "message"),
    [
        (
            "glm4v_moe",
            {"target_modules": ["q_proj", "gate_proj", "up_proj"]},
            "peft would adapt gate_up_proj as parameters",
        ),
        ("glm4v_moe", {"target_modules": "all-linear"}, "adapt down_proj, gate.weight, gate_up_proj as"),
        ("qwen3_vl_moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}, "adapt experts.down_proj"),
        ("llama4", {"target_modules": "all-linear"}, "router is Llama4Router; valid: target_modules that are linear"),
    ],
)
def test_adapters_of_experts_and_routers_by_peft_are_refused(model_type, given, message):
    model = get_peft_model(tiny_model(model_type), LoraConfig(r=2, **given))
    with pytest.raises(ConfigError, match=message) as raised:
        DualSpeedModel(model, DualSpeedConfig())
    assert "\n" not in str(raised.value)

"""Base models from parts: stock classes, the Hub's names and shapes, and the parts' own weights and outputs."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from dualspeed.base_models.assemble import assemble, build_model, make_config
from dualspeed.base_models.hub_names import hub_name
from dualspeed.errors import BaseModelError
from dualspeed.settings.model import ModelParts
from tests.support import parts, tiny
from tests.support.parts import hub_shapes

FAMILIES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
VICUNA_7B = LlamaConfig()  # transformers' defaults are Llama-2-7B's sizes, which Vicuna v1.5 has
VICUNA_13B = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
CLIP_LARGE = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)


class TokenizerOfVicuna:
    """Stand-in for Vicuna's tokenizer in `make_config`: 32,000 tokens and two more."""

    bos_token_id, eos_token_id = 1, 2

    def __len__(self) -> int:
        return 32_002

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<image>": 32_000, "<pad>": 32_001}[token]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [VICUNA_7B, VICUNA_13B], ids=["7b", "13b"])
def test_names_and_shapes_are_those_of_the_hub(family, text):
    made_of = ModelParts(family=family, language_model="", vision_tower="")
    config = make_config(made_of, LlamaConfig(**text.to_dict()), CLIP_LARGE, TokenizerOfVicuna())
    model = build_model(config, torch.bfloat16)
    assert type(model) is FAMILIES[family]
    assert (config.text_config.vocab_size, config.image_token_id) == (32_064, 32_000)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    found = {hub_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    sizes = (text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    assert found == hub_shapes(family, *sizes, vocabulary=32_064)
    num_llama = 9 * text.num_hidden_layers + 3
    assert len(found) == num_llama + 391 + 4 + (family == "llava_next")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    parts.make_vicuna(folder / "vicuna")
    parts.make_clip(folder / "clip")
    parts.make_projector(folder / "mm_projector.bin")
    return folder


def parts_of(sources, family, **changes) -> ModelParts:
    paths = {"language_model": str(sources / "vicuna"), "vision_tower": str(sources / "clip")}
    grids = {"image_grid_pinpoints": ((28, 56), (56, 28), (56, 56))} if family == "llava_next" else {}
    return ModelParts(**({"family": family, "dtype": "float32"} | paths | grids | changes))


@pytest.fixture(scope="module", params=FAMILIES)
def assembled(request, sources, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "model"
    assemble(parts_of(sources, request.param, projector=str(sources / "mm_projector.bin")), out)
    return request.param, out


def names_in(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_checkpoints_have_the_names_of_the_hub_before_and_after_save_pretrained(assembled, tmp_path):
    family, folder = assembled
    expected = hub_shapes(
        family, parts.TEXT_WIDTH, 96, parts.TEXT_LAYERS, 384, (parts.VISION_WIDTH, 64, parts.VISION_LAYERS, 17, 7)
    )
    assert names_in(folder) == expected
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model) is FAMILIES[family]
    assert not any(report.values())
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == expected


def test_the_parts_keep_their_weights(assembled, sources):
    _, folder = assembled
    model = AutoModelForImageTextToText.from_pretrained(folder)
    vicuna = AutoModelForCausalLM.from_pretrained(sources / "vicuna", dtype=torch.float32)
    text = torch.tensor([[1, 300, 301, 302]])
    size = parts.NUM_TOKENS
    assert_close(model(input_ids=text).logits[..., :size], vicuna(input_ids=text).logits)
    assert_close(model.lm_head.weight[size], vicuna.lm_head.weight.mean(dim=0))
    clip = CLIPVisionModel.from_pretrained(sources / "clip")
    pixels = torch.randn(1, 3, parts.IMAGE_SIZE, parts.IMAGE_SIZE)
    assert_close(model.model.vision_tower(pixels).last_hidden_state, clip(pixels).last_hidden_state)
    projector = torch.load(sources / "mm_projector.bin", weights_only=True)
    features = torch.randn(1, 5, parts.VISION_WIDTH)
    expected = torch.nn.functional.linear(
        features, *(projector[f"model.mm_projector.0.{name}"].float() for name in ("weight", "bias"))
    )
    expected = torch.nn.functional.linear(
        torch.nn.functional.gelu(expected),
        *(projector[f"model.mm_projector.2.{name}"].float() for name in ("weight", "bias")),
    )
    assert_close(model.model.multi_modal_projector(features), expected)


def test_the_processor_has_llavas_tokens_and_prompt(assembled, sources):
    family, folder = assembled
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    size = parts.NUM_TOKENS
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [size, size + 1]
    assert (processor.image_token_id, tokenizer.pad_token_id) == (size, size + 1)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    assert prompt.endswith("USER: <image>\nWhat colour is it? ASSISTANT:")
    batch = processor(images=[Image.new("RGB", (56, 56))], text=[prompt], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model(**batch)  # placeholders and features agree in number
    num_tokens = int((batch["input_ids"] == size).sum())
    assert num_tokens == (16 if family == "llava" else 16 + 64 + 8)
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_token_index"] if "image_token_index" in config else config["image_token_id"]) == size


def test_a_projector_can_start_from_random_weights_that_are_always_the_same(sources, tmp_path):
    for name in ("one", "two"):
        assemble(parts_of(sources, "llava_next"), tmp_path / name)
    one, two = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    assert one.model.image_newline.std() > 0


def test_a_published_newline_is_taken_where_there_is_one(sources, tmp_path):
    file = parts.make_projector(tmp_path / "mm_projector.bin", with_newline=True)
    assemble(parts_of(sources, "llava_next", projector=str(file)), tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    published = torch.load(file, weights_only=True)["model.image_newline"].float()
    assert_close(model.model.image_newline.data, published)


def test_a_checkpoint_of_the_hub_serves_as_it_is(tmp_path):
    assert names_in(tiny.make_llava(tmp_path)).keys() == hub_shapes("llava", 48, 96, 2, 64, (32, 64, 3, 17, 7)).keys()


def test_parts_that_do_not_fit_are_one_clear_error(sources, tmp_path):
    with pytest.raises(BaseModelError, match="nowhere: does not exist"):
        assemble(parts_of(sources, "llava", language_model="nowhere"), tmp_path / "model")
    torch.save({"model.mm_projector.0.weight": torch.zeros(3, 3)}, tmp_path / "wrong.bin")
    with pytest.raises(BaseModelError, match="is no projector of this model"):
        assemble(parts_of(sources, "llava", projector=str(tmp_path / "wrong.bin")), tmp_path / "model")
    assert not (tmp_path / "model").exists()

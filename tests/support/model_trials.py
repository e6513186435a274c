"""Trials of a tiny model of any class: what an accepted one must pass, and the line about it in docs/models.md."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from dualspeed import DualSpeedConfig, DualSpeedModel, LoraRecipe, Mode, add_adapters
from dualspeed.errors import ModelError
from dualspeed.method.adapters import merged
from dualspeed.method.vlm.admission import check_settings
from dualspeed.method.vlm.encoder import accepted_inputs
from dualspeed.method.vlm.entrance import runner
from dualspeed.method.vlm.families import CAPTURED_FIELDS, family_of
from dualspeed.method.vlm.positions import make_positions, positions_3d
from dualspeed.pruners import PRUNERS
from dualspeed.training.trainable import hold_trained_weights_in_float32, parts_of, set_trainable
from tests.support.tiny_images import IMAGE, Inputs, batch
from tests.support.tiny_models import MODEL_TYPES, model_without_weights, tiny_model

TIMM = ("fast_vlm", "gemma3n", "perception_lm")
"""Model types whose tower is one of timm's, which needs torchvision."""
TILED = (
    *("aria", "aya_vision", "cohere2_vision", "got_ocr2", "granite_docling", "idefics2", "idefics3", "internvl"),
    *("lfm2_vl", "llama4", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "ovis2", "perception_lm", "qianfan_ocr"),
    "smolvlm",
)
"""Model types whose processors cut an image into tiles that the model returns one by one."""
MIXED, TEXT = [1, 2, 0], [0, 0]
NEW_TOKENS = 4
STEPS = 15


def stock(model_type: str) -> PreTrainedModel:
    """The model under trial, without dropout."""
    return tiny_model(model_type).eval()


def model_of(model_type: str, **settings) -> DualSpeedModel:
    """The model under trial, with the method's settings."""
    model = DualSpeedModel(stock(model_type), DualSpeedConfig(**settings))
    set_trainable(model, "finetune")
    return model


def text_loss(model_type: str, inputs: Inputs) -> Tensor:
    """Stock loss of a batch without images; of the language model alone where the whole demands images."""
    return runner(stock(model_type))(**inputs).loss


def images_matter(model_type: str) -> None:
    """Other pixels give another loss, without which equal losses would mean nothing."""
    vlm = stock(model_type)
    inputs = batch(vlm, MIXED)
    others = {name: 0.7 - 1.5 * v if v.is_floating_point() else v for name, v in inputs.items()}
    assert (vlm(**inputs).loss - vlm(**others).loss).abs() > 1e-6


def slow_mode_is_stock(model_type: str) -> None:
    """Slow mode without distillation has the stock loss, with images and without."""
    inputs, text = (batch(stock(model_type), images) for images in (MIXED, TEXT))
    for given, loss in ((inputs, stock(model_type)(**inputs).loss), (text, text_loss(model_type, text))):
        assert_close(model_of(model_type)(mode=Mode.SLOW, distill=False, **given).loss, loss, atol=1e-5, rtol=1e-5)


def fast_mode_of_all_is_stock(model_type: str) -> None:
    """Fast mode that keeps every token, without isolator, has the stock loss."""
    model = model_of(model_type, pruning_ratio=0.0, num_virtual_tokens=0)
    inputs = batch(model.vlm, MIXED)
    loss = model(mode=Mode.FAST, **inputs).loss
    assert_close(loss, stock(model_type)(**inputs).loss, atol=1e-5, rtol=1e-5)


def fast_mode_learns(model_type: str) -> None:
    """At 90 % the loss falls, and a gradient reaches every trained parameter and changes the projector."""
    model = model_of(model_type, pruning_ratio=0.9).train()
    inputs = batch(model.vlm, MIXED)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    projector = [p for name, p in trained.items() if parts_of(model)[name] == "projector" and "isolator" not in name]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = model(mode=Mode.FAST, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert [name for name, p in trained.items() if p.grad is None] == []
            assert any(p.grad.any() for p in projector)
            assert model.mode_isolator.weight.grad.any()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def slow_mode_reaches_all_but_the_unused(model_type: str) -> None:
    """A slow step gives a gradient to every parameter but those that are said to be unused."""
    model = model_of(model_type, pruning_ratio=0.9).train().requires_grad_(True)
    output = model(mode=Mode.SLOW, **batch(model.vlm, MIXED))
    assert output.distillation_loss > 0
    output.loss.backward()
    ignored = tuple(f"vlm.{path}" for path in family_of(model.vlm).ignored)
    wrong = {
        name: part
        for name, part in parts_of(model).items()
        if (model.get_parameter(name).grad is None) != (part == "unused") and not name.startswith(ignored or "-")
    }
    assert wrong == {}


def text_alone_calls_the_same_modules(model_type: str) -> None:
    """With other ranks, a batch without images has the loss of its text, and every parameter is in its graph."""
    text = batch(stock(model_type), TEXT)
    loss_of_text = text_loss(model_type, text)
    with other_ranks():
        for mode in Mode:
            model = model_of(model_type)
            loss = model(mode=mode, **text).loss
            assert_close(loss, loss_of_text, atol=1e-5, rtol=1e-5)
            loss.backward()
            assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@contextmanager
def other_ranks():
    """Let a model take this process for one of several."""
    from dualspeed.method import model

    before, model.has_other_ranks = model.has_other_ranks, lambda: True
    try:
        yield
    finally:
        model.has_other_ranks = before


def adapters_learn_and_are_merged(model_type: str) -> None:
    """LoRA: a fast step reaches every adapter, and the stock model with merged weights has the adapted loss."""
    vlm = stock(model_type)
    add_adapters(vlm, LoraRecipe(rank=2, alpha=4, dropout=0.0))
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if ".lora_B" in name:  # as if trained: an untrained adapter's product is 0
                parameter.normal_(std=0.1)
    model = DualSpeedModel(vlm, DualSpeedConfig())
    set_trainable(model, "finetune")
    inputs = batch(vlm, MIXED)
    model(mode=Mode.FAST, **inputs).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    whole = stock(model_type)
    before = whole(**inputs).loss
    whole.load_state_dict(merged(vlm, vlm.state_dict(), {}))
    assert_close(whole(**inputs).loss, vlm(**inputs).loss, atol=1e-5, rtol=1e-5)
    assert (whole(**inputs).loss - before).abs() > 1e-4


def a_tower_in_bfloat16_feeds_weights_in_float32(model_type: str) -> None:
    """A frozen tower keeps a checkpoint's bfloat16, trained weights are float32, and autocast joins them."""
    vlm = stock(model_type)
    inputs = batch(vlm, MIXED)
    for stage, trained in (("pretrain", "projector"), ("finetune", "language")):
        model = DualSpeedModel(stock(model_type).to(torch.bfloat16), DualSpeedConfig(pruning_ratio=0.5))
        set_trainable(model, stage)
        hold_trained_weights_in_float32(model)
        parts = parts_of(model)
        dtypes = {
            part: {p.dtype for name, p in model.named_parameters() if parts[name] == part} for part in parts.values()
        }
        assert dtypes[trained] == {torch.float32} and torch.float32 not in dtypes.get("vision", ())
        for mode in Mode:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(mode=mode, **inputs).loss
            loss.backward()
            assert torch.isfinite(loss)


def generates_on_pruned_tokens(model_type: str) -> None:
    """Generation on all tokens without isolator is the stock model's; on a tenth it gives as many tokens."""
    prompts = batch(stock(model_type), [1, 2], padding_side="left")
    del prompts["labels"]
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    generated = {}
    for ratio, length in ((0.0, 0), (0.9, 4)):
        model = model_of(model_type, pruning_ratio=ratio, num_virtual_tokens=length)
        settings = runner(model.vlm).generation_config
        settings.eos_token_id, settings.suppress_tokens = None, [IMAGE]
        generated[ratio] = model.generate(mode=Mode.FAST, **arguments, **prompts)
        if ratio == 0.0:
            generated["stock"] = model.vlm.generate(**arguments, **prompts)
    assert torch.equal(generated[0.0][:, -NEW_TOKENS:], generated["stock"][:, -NEW_TOKENS:])
    assert generated[0.9].shape[1] == prompts["input_ids"].shape[1] + NEW_TOKENS


def batched_is_alone(model_type: str) -> None:
    """A sample is pruned and trained alike in any batch, on either padding side."""
    for pruner in ("divprune", "random"):
        model = model_of(model_type, pruning_ratio=0.5, pruner=pruner)
        alone = [model(mode=Mode.FAST, **batch(model.vlm, [n], seed=seed)).loss for seed, n in enumerate(MIXED)]
        for side in ("right", "left"):
            batched = model(mode=Mode.FAST, **batch(model.vlm, MIXED, side)).loss
            assert_close(batched, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)


def positions_need_no_weights(model_type: str) -> None:
    """Positions that the collator computes from the configuration alone are the model's own."""
    vlm = stock(model_type)
    compute = make_positions(vlm)
    if compute is not None:
        inputs = batch(vlm, MIXED)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        images = {name: inputs[name] for name in accepted_inputs(vlm) if name in inputs}
        own = positions_3d(vlm.model, IMAGE, ids, mask, images)
        assert torch.equal(compute(ids, mask, images), own)
        assert (own.diff(dim=1) != 0).any()


TRIALS: tuple[Callable[[str], None], ...] = (
    images_matter,
    slow_mode_is_stock,
    fast_mode_of_all_is_stock,
    fast_mode_learns,
    slow_mode_reaches_all_but_the_unused,
    text_alone_calls_the_same_modules,
    adapters_learn_and_are_merged,
    a_tower_in_bfloat16_feeds_weights_in_float32,
    generates_on_pruned_tokens,
    batched_is_alone,
    positions_need_no_weights,
)


def refusal(model_type: str) -> str | None:
    """Why a model of this type is refused, found on a model without weights; None if it is accepted that far."""
    try:
        DualSpeedModel(model_without_weights(model_type), DualSpeedConfig())
    except ModelError as error:
        return str(error).split("on pruned tokens, since ")[1]
    return None


def line_of_refused(model_type: str, reason: str) -> str:
    """Line of the table about a refused model type."""
    return f"| `{model_type}` | `{MODEL_TYPES[model_type]}` | refused: {reason} | | | |"


def line_of(model_type: str, vlm: PreTrainedModel) -> str:
    """Line of the table about an accepted model type, found by trying every pruner."""
    methods = [name for name in PRUNERS if accepts(vlm, name)]
    feature_based = [name for name in PRUNERS if not set(PRUNERS[name].needs) & set(CAPTURED_FIELDS)]
    assert methods in (list(PRUNERS), feature_based)
    unit = "tile" if model_type in TILED else "image"
    return (
        f"| `{model_type}` | `{MODEL_TYPES[model_type]}` | trained | "
        f"{'all' if methods == list(PRUNERS) else 'feature-based'} | {unit} | {dependency(model_type)} |"
    )


def accepts(vlm: PreTrainedModel, pruner: str) -> bool:
    """True if a pruning method goes with a model."""
    try:
        check_settings(vlm, pruner, PRUNERS[pruner].needs, "image")
    except ModelError:
        return False
    return True


def dependency(model_type: str) -> str:
    """Package that the model or its processor needs."""
    if model_type in TIMM:
        return "needs timm and torchvision"
    return "needs torchvision" if processor_needs_torchvision(model_type) else ""


def processor_needs_torchvision(model_type: str) -> bool:
    """True if a type's processor takes video, or its image processor has no form without torchvision."""
    images = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    if isinstance(images, dict) and "pil" not in images:
        return True
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    try:
        return name is not None and "video_processor" in getattr(transformers, name).get_attributes()
    except ImportError:
        return True

"""Training of the demo's base model: vision tower, then language model with projector (dualspeed.demo.base_model).

Shapes: B images in a step, P patches of an image, W width of the vision tower.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dualspeed.batch import IGNORE_INDEX
from dualspeed.chat_templates import load_template
from dualspeed.data.conversations import ROLES
from dualspeed.demo.drawing import COLOURS, GRID
from dualspeed.errors import DivergenceError
from dualspeed.method.losses import cross_entropy, supervised_labels, supervised_positions
from dualspeed.settings.demo import BaseModelSettings

WARMUP_STEPS = 50
QUESTION_SHARE = 0.8
"""Share of question steps in the second phase; its other steps repeat captions, against forgetting."""
SupervisedText = tuple[Tensor, Tensor]
"""(L,) tokens with one placeholder for the image, and (L,) labels."""


def train_vision_tower(
    tower: CLIPVisionModel, settings: BaseModelSettings, pixels: Tensor, scenes: list[dict[str, Any]]
) -> None:
    """Train the tower's selected layer to classify each patch, and its CLS token to classify the whole image.

    The CLS token is trained so that its attention falls on the digits, as attention-based pruners expect.

    Args:
        pixels: (images, 3, H, W).
        scenes: labels of the images, as scenes.json lists them.
    """
    colours, digits = patch_labels(scenes)
    patch_head = nn.Linear(tower.config.hidden_size, len(COLOURS) + 1 + 11)
    image_head = nn.Linear(tower.config.hidden_size, len(COLOURS) + 10)
    present = torch.cat([presence(colours, len(COLOURS)), presence(digits, 10)], dim=1).float()
    # Most patches are empty; with this weight all of them together count about as much as the digits.
    colour_weight = torch.tensor([0.05] + [1.0] * len(COLOURS))
    digit_weight = torch.tensor([0.05] + [1.0] * 10)

    def loss(rows: Tensor) -> Tensor:
        hidden = selected_features(tower, pixels[rows])
        colour_logits, digit_logits = patch_head(hidden[:, 1:]).flatten(0, 1).split([len(COLOURS) + 1, 11], dim=-1)
        return (
            F.cross_entropy(colour_logits, colours[rows].flatten(), colour_weight)
            + F.cross_entropy(digit_logits, digits[rows].flatten(), digit_weight)
            + F.binary_cross_entropy_with_logits(image_head(hidden[:, 0]), present[rows])
        )

    parameters = [*tower.parameters(), *patch_head.parameters(), *image_head.parameters()]
    rng = np.random.default_rng(settings.seed)

    def step(_: int) -> Tensor:
        return loss(torch.from_numpy(rng.integers(len(pixels), size=settings.vision_batch_size)))

    optimise("base model: vision tower", parameters, step, settings.vision_steps, settings.vision_learning_rate)


def train_language_model(
    model: LlavaForConditionalGeneration,
    settings: BaseModelSettings,
    features: Tensor,
    captions: list[SupervisedText],
    conversations: list[SupervisedText],
    has_digit: Tensor,
) -> None:
    """Train language model and projector to describe excerpts of images, then to answer questions about them.

    The few patches with digits are found soon among the 14 of an excerpt, late among all of an image, and an excerpt
    costs a quarter. Captions come first, since answering builds on what they teach.

    Args:
        features: (images, P, W) of the frozen tower.
        captions: one for each image.
        conversations: one for each image.
        has_digit: (images, P) bool, True for patches with a digit.
    """
    rng = np.random.default_rng(settings.seed)

    def step(number: int) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(features), size=settings.language_batch_size))
        shown = excerpt(features[rows], has_digit[rows], settings.excerpt_patches)
        asks = number >= settings.caption_steps and rng.random() < QUESTION_SHARE
        texts = conversations if asks else captions
        return language_loss(model, shown, [texts[row] for row in rows])

    modules = (model.model.language_model, model.lm_head, model.model.multi_modal_projector)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    num_steps = settings.caption_steps + settings.question_steps
    optimise("base model: language", parameters, step, num_steps, settings.language_learning_rate)


def excerpt(features: Tensor, has_digit: Tensor, num_patches: int) -> Tensor:
    """Select the patches with a digit and random others, in raster order: (B, P, W) -> (B, num_patches, W)."""
    chosen = (torch.rand(has_digit.shape) + has_digit).topk(num_patches, dim=1).indices.sort(dim=1).values
    return features.gather(1, chosen[:, :, None].expand(-1, -1, features.shape[2]))


def optimise(
    title: str, parameters: list[nn.Parameter], step: Callable[[int], Tensor], num_steps: int, learning_rate: float
) -> None:
    """Minimise the loss that `step(number)` returns, with AdamW and a cosine schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARMUP_STEPS, num_steps // 2), num_steps)
    progress = tqdm(range(num_steps), desc=title, unit="step", mininterval=5)
    for number in progress:
        loss = step(number)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % 50 == 49:
            if not loss.isfinite():
                raise DivergenceError(
                    f"{title}: the loss is {loss.item()} at step {number + 1}; try another learning rate or seed"
                )
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def load_pixels(images: list[Path], processor: LlavaProcessor) -> Tensor:
    """Read and preprocess images: (images, 3, H, W)."""
    # One by one: the image processor copies a batch several times, which costs more than separate calls.
    progress = tqdm(images, desc="base model: images", unit="image", mininterval=5)
    return torch.cat(
        [processor.image_processor(Image.open(path), return_tensors="pt").pixel_values for path in progress]
    )


def selected_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Hidden states of the last layer but one, CLS token first: (B, 3, H, W) -> (B, 1 + P, W)."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


@torch.no_grad()
def encode_images(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Features of the frozen tower without the CLS token: (images, 3, H, W) -> (images, P, W)."""
    return torch.cat([selected_features(tower, chunk)[:, 1:] for chunk in pixels.split(256)])


def patch_labels(scenes: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Classes of each patch's colour and of its digit, both (scenes, P); 0 is an empty patch."""
    names = list(COLOURS)
    colours = torch.zeros(len(scenes), GRID * GRID, dtype=torch.long)
    digits = torch.zeros_like(colours)
    for row, scene in enumerate(scenes):
        for cell, colour, digit in scene["items"]:
            colours[row, cell] = 1 + names.index(colour)
            digits[row, cell] = 1 + digit
    return colours, digits


def presence(labels: Tensor, num_classes: int) -> Tensor:
    """True for each class that occurs on a patch: (scenes, P) -> (scenes, num_classes); the empty patch is left out."""
    return torch.stack([(labels == 1 + index).any(dim=1) for index in range(num_classes)], dim=1)


def caption_texts(tokenizer: PreTrainedTokenizerFast, records: list[dict[str, Any]]) -> list[SupervisedText]:
    """Tokens and labels of captions after the image's placeholder, in LLaVA's plain format."""
    image = tokenizer("<image>", return_tensors="pt").input_ids[0]
    captions = [record["conversations"][1]["value"] for record in records]
    encoded = [torch.tensor(row) for row in tokenizer(captions, add_special_tokens=False).input_ids]
    ignored = torch.full_like(image, IGNORE_INDEX)
    return [(torch.cat([image, caption]), torch.cat([ignored, caption])) for caption in encoded]


def conversation_texts(processor: LlavaProcessor, records: list[dict[str, Any]]) -> list[SupervisedText]:
    """Tokens and labels of conversations, with one placeholder for the image before the first question."""
    # The processor rejects a placeholder without its image, so it is inserted afterwards, behind "<s> USER:".
    encoded = processor.apply_chat_template(
        [
            [
                {"role": ROLES[turn["from"]], "content": turn["value"].removeprefix("<image>\n")}
                for turn in record["conversations"]
            ]
            for record in records
        ],
        chat_template=load_template("turns"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    texts = []
    for row, is_answer in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        ids = torch.tensor([*row[:2], processor.image_token_id, *row[2:]])
        texts.append((ids, ids.where(torch.tensor([0, *is_answer], dtype=torch.bool), IGNORE_INDEX)))
    return texts


def language_loss(model: LlavaForConditionalGeneration, features: Tensor, texts: list[SupervisedText]) -> Tensor:
    """Cross-entropy of texts about images with features (B, P, W)."""
    image_token_id = model.config.image_token_id
    copies = [torch.where(ids == image_token_id, features.shape[1], 1) for ids, _ in texts]
    rows = [ids.repeat_interleave(count) for (ids, _), count in zip(texts, copies, strict=True)]
    labels = pad_sequence(
        [labels.repeat_interleave(count) for (_, labels), count in zip(texts, copies, strict=True)],
        batch_first=True,
        padding_value=IGNORE_INDEX,
    )
    projected = BaseModelOutputWithPooling(pooler_output=list(model.model.multi_modal_projector(features)))
    logits = model(
        input_ids=pad_sequence(rows, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        mm_encoder_outputs={"image": projected},
        logits_to_keep=supervised_positions(labels),
        use_cache=False,
    ).logits
    targets = supervised_labels(labels)
    return cross_entropy(logits, targets, len(targets))

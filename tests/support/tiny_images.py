"""Images of noise for any VLM, made of what its record says about a blank image, and batches with them."""

import inspect

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from dualspeed.method.vlm.families import family_of
from dualspeed.method.vlm.vision import encode_images
from tests.support.tiny_models import IMAGE, PAD

Inputs = dict[str, Tensor]
SIDES = [(2, 2), (2, 3), (3, 2)]
"""Rows and columns of tokens of each image, for models that take images of any size."""
SUPERVISED = 5


def noise(vlm: PreTrainedModel, seed: int) -> Inputs:
    """One image, of SIDES[seed] if the model takes any size."""
    blank = family_of(vlm).blank_image(vlm)
    rows, columns = SIDES[seed % len(SIDES)]
    grown = {name: grow(name, values, blank, rows, columns) for name, values in blank.items()}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(values.shape, generator=generator) + 0.1 if values.is_floating_point() else values
        for name, values in grown.items()
    }


def grow(name: str, values: Tensor, blank: Inputs, rows: int, columns: int) -> Tensor:
    """Input of a blank image of one token -> that of an image with more of them, where sizes are free."""
    count = rows * columns
    if name in ("image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes"):
        return values * torch.tensor([*[1] * (values.shape[-1] - 2), rows, columns])
    if name == "image_position_ids":
        side = int(values.max()) + 1
        # A square of patches after the other, as they become tokens.
        places = torch.cartesian_prod(torch.arange(columns * side), torch.arange(rows * side))
        return places[None]
    if name == "image_grids":
        return torch.tensor([[rows, columns, 0, 0]])
    if name == "image_token_pooling":
        return (torch.arange(count)[:, None] * 2 + torch.arange(4)) % 16
    if name == "pixel_attention_mask" and "spatial_shapes" in blank:
        return values.repeat(1, count)
    if name == "pixel_values" and "target_sizes" in blank:
        return values.repeat(1, 1, 1, count)
    if name == "pixel_values" and {"spatial_shapes", "image_position_ids"} & set(blank):
        return values.repeat(1, count, 1)
    if name == "pixel_values" and {"image_grid_thw", "image_grid_hw"} & set(blank):
        return values.repeat(count, *[1] * (values.dim() - 1))
    return values


def joined(images: list[Inputs]) -> Inputs:
    """Inputs of several images as one batch, padded where images differ."""
    return {name: join(name, [image[name] for image in images]) for name in images[0]} if images else {}


def join(name: str, values: list[Tensor]) -> Tensor:
    """One input of several images as one."""
    if name == "pixel_values" and values[0].dim() == 4 and values[0].shape[-1] > 4 * values[0].shape[-2]:
        return torch.cat(values, dim=-1)
    if name == "image_token_pooling":
        return torch.cat([pooled + 16 * index for index, pooled in enumerate(values)])
    if len({value.shape[1:] for value in values}) > 1:
        length = max(value.shape[1] for value in values)
        fill = -1 if name == "image_position_ids" else 0
        values = [F.pad(v, (*[0, 0] * (v.dim() - 2), 0, length - v.shape[1]), value=fill) for v in values]
    return torch.cat(values)


def num_tokens(vlm: PreTrainedModel, image: Inputs) -> list[int]:
    """Tokens of each unit of an image, as the model encodes it alone."""
    with torch.no_grad():
        return [len(unit) for unit in encode_images(vlm, image).features]


def token_inputs_of(vlm: PreTrainedModel) -> list[str]:
    """Inputs with one number a token that a model's forward takes."""
    return [name for name in inspect.signature(type(vlm).forward).parameters if "token_type" in name]


def start_token(vlm: PreTrainedModel) -> int | None:
    """Token that stands before an image, where positions or features depend on it."""
    indicators = getattr(vlm.config, "visual_indicator_token_ids", None)
    return indicators[0] if indicators else getattr(vlm.config, "vision_start_token_id", None)


def batch(vlm: PreTrainedModel, num_images: list[int], padding_side: str = "right", seed: int = 0) -> Inputs:
    """Batch of a sample per number of images: words, images with words between, words; the last ones supervised."""
    rows, images = [], []
    start = start_token(vlm)
    for index, count in enumerate(num_images):
        generator = torch.Generator().manual_seed(100 + seed + index)
        words = torch.randint(9, 59, (20,), generator=generator).tolist()
        row = [1, *words[: 4 + (seed + index) % 3]]
        for place in range(count):
            image = noise(vlm, 10 * (seed + index) + place)
            images.append(image)
            row += [*([start] if start is not None else []), *[IMAGE] * sum(num_tokens(vlm, image)), words[6 + place]]
        rows.append([*row, *words[12:]])
    length = max(map(len, rows))

    def pad(values: list[int], padding: int) -> list[int]:
        fill = [padding] * (length - len(values))
        return values + fill if padding_side == "right" else fill + values

    ids = torch.tensor([pad(row, PAD) for row in rows])
    inputs = joined(images) | {
        "input_ids": ids,
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([pad([-100] * (len(row) - SUPERVISED) + row[-SUPERVISED:], -100) for row in rows]),
    }
    for name in token_inputs_of(vlm):
        inputs[name] = (ids == IMAGE).int()
    return inputs

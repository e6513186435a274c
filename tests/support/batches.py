"""Batches of random samples for the models of tests/support/tiny.py."""

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.support import tiny

IMAGE_TOKEN = tiny.SPECIAL_TOKENS.index("<image>")
PAD_TOKEN = tiny.SPECIAL_TOKENS.index("<pad>")
NEXT_SIZES = [(20, 60), (60, 21), (28, 28)]


def sample(family: str, seed: int, num_images: int) -> dict:
    """One sample: text, images of different shapes, then text whose last five tokens are supervised."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(5, 25, (16,), generator=generator).tolist()
    images, ids = [], [1, *words[:4]]
    for index in range(num_images):
        if family == "llava":
            images.append({"pixel_values": torch.randn(3, 28, 28, generator=generator)})
            ids += [IMAGE_TOKEN] * tiny.NUM_IMAGE_TOKENS
        else:
            size = torch.tensor(NEXT_SIZES[(seed + index) % len(NEXT_SIZES)])
            num_tiles, num_tokens = next_shape(size)
            images.append({"pixel_values": torch.randn(num_tiles, 3, 28, 28, generator=generator), "image_sizes": size})
            ids += [IMAGE_TOKEN] * num_tokens
        ids += words[4 + index : 6 + index]
    ids += words[6:]
    return {"ids": ids, "labels": [-100] * (len(ids) - 5) + ids[-5:], "images": images}


def next_shape(size: torch.Tensor) -> tuple[int, int]:
    """Number of tiles and of packed tokens of an image, by the stock model."""
    num_tiles = image_size_to_num_patches(size, tiny.GRID_PINPOINTS, tiny.IMAGE_SIZE)
    model = tiny.llava_next()
    features = model.get_image_features(
        torch.zeros(1, num_tiles, 3, 28, 28), size[None], return_dict=True
    ).pooler_output
    return num_tiles, len(features[0])


def collate(samples: list[dict], padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Batch of samples, padded to the longest."""
    length = max(len(sample["ids"]) for sample in samples)

    def pad(values: list[int], padding: int) -> list[int]:
        fill = [padding] * (length - len(values))
        return values + fill if padding_side == "right" else fill + values

    batch = {
        "input_ids": torch.tensor([pad(sample["ids"], PAD_TOKEN) for sample in samples]),
        "attention_mask": torch.tensor([pad([1] * len(sample["ids"]), 0) for sample in samples]),
        "labels": torch.tensor([pad(sample["labels"], -100) for sample in samples]),
    }
    images = [image for sample in samples for image in sample["images"]]
    if images and images[0]["pixel_values"].dim() == 4:
        most = max(len(image["pixel_values"]) for image in images)
        batch["pixel_values"] = torch.stack(
            [torch.nn.functional.pad(i["pixel_values"], (0,) * 7 + (most - len(i["pixel_values"]),)) for i in images]
        )
        batch["image_sizes"] = torch.stack([image["image_sizes"] for image in images])
    elif images:
        batch["pixel_values"] = torch.stack([image["pixel_values"] for image in images])
    return batch

"""Preparation of a stage's data: annotations and images are checked once, and what cannot be trained on is listed.

Enters: a recipe (annotations, image folder, chat template, max_length) and a model's processor. Leaves: a folder with a
`datasets` dataset of rows {id, messages, images, num_tokens} and manifest.json, which names every sample that was
dropped and why. The folder appears whole or not at all.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from datasets import Dataset, Features, List, Value
from tqdm import tqdm
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from dualspeed.data.collator import ConversationCollator
from dualspeed.data.conversations import Problem, load_conversations
from dualspeed.data.images import ImageReport, inspect_image
from dualspeed.data.processing import load_processor
from dualspeed.files import atomic_folder
from dualspeed.losses import IGNORE_INDEX
from dualspeed.recipe import DataRecipe

FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Value("string")),
        "num_tokens": Value("int32"),
    }
)

NUM_LISTED = 10
"""Dropped samples that an error quotes; the manifest lists all."""


class PreparationError(ValueError):
    """The data cannot be prepared; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Layout:
    """A sample's token sequence before images are expanded, one entry per token."""

    widths: np.ndarray
    """Positions that a token takes in the model: 1, or an image's number of visual tokens."""
    is_image: np.ndarray
    is_supervised: np.ndarray


def prepare_dataset(recipe: DataRecipe, model: str | Path, out: str | Path, workers: int = 1) -> dict[str, Any]:
    """Write the dataset of `recipe` for the model in folder `model` to the folder `out`; returns the manifest.

    `workers` threads check images. Samples that need images, text or answers which are not there, or that have
    nothing supervised within max_length, are dropped and listed.

    Raises:
        PreparationError: a folder is missing, the disk is full, or too large a share of the samples is unusable.
        AnnotationsError: the annotations cannot be read at all.
    """
    recipe_images, model, out = Path(recipe.images), Path(model), Path(out)
    check_folders(recipe, model, out)
    records, problems = load_conversations(recipe.annotations, recipe_images)
    num_total = len(records) + len(problems)
    reports = inspect_images(dict.fromkeys(path for record in records for path in record["images"]), workers)
    records, unusable = split_by_images(records, reports)
    problems += unusable
    processor = load_processor(model, recipe.chat_template, recipe.image_aspect_ratio)
    rows, num_cut, too_long = count_tokens(processor, records, reports, recipe.max_length)
    problems += too_long
    check_share(recipe, problems, num_total)
    manifest = make_manifest(rows, problems, reports, num_cut)
    write_dataset(rows, manifest, out)
    return manifest


def check_folders(recipe: DataRecipe, model: Path, out: Path) -> None:
    """Raise PreparationError, before any work, for a missing input or a full disk."""
    if not Path(recipe.annotations).is_file():
        raise PreparationError(f"annotations: {recipe.annotations} does not exist; valid: a LLaVA conversation file")
    if not Path(recipe.images).is_dir():
        raise PreparationError(
            f"images: {recipe.images} is not a folder; valid: the folder that image paths start from"
        )
    if not model.is_dir():
        raise PreparationError(f"model: {model} is not a folder; valid: a checkpoint with its processor")
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    # The dataset holds what the annotations hold, in Arrow's form; images stay where they are.
    needed = 2 * Path(recipe.annotations).stat().st_size
    if free < needed:
        raise PreparationError(f"{out}: {needed / 1e6:.0f} MB are needed and the disk has {free / 1e6:.0f} MB left")


def inspect_images(paths: Iterable[str], workers: int) -> dict[str, ImageReport]:
    """Path -> report, for each of `paths`, by `workers` threads."""
    paths = list(paths)
    progress = {"total": len(paths), "desc": "checking images", "unit": "image", "mininterval": 1}
    # Threads will do: Pillow decodes without holding Python's lock.
    with ThreadPoolExecutor(workers) as pool:
        reports = tqdm(pool.map(inspect_image, paths), **progress)
        return dict(zip(paths, reports, strict=True))


def split_by_images(
    records: list[dict[str, Any]], reports: dict[str, ImageReport]
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Records whose images are all usable, and the problem of each other one (its first bad image)."""
    usable, problems = [], []
    for record in records:
        bad = next((reports[path] for path in record["images"] if reports[path].reason), None)
        if bad is None:
            usable.append(record)
        else:
            problems.append(Problem(record["id"], bad.path, f"image: {bad.reason}", bad.detail))
    return usable, problems


def count_tokens(
    processor: ProcessorMixin, records: list[dict[str, Any]], reports: dict[str, ImageReport], max_length: int
) -> tuple[list[dict[str, Any]], int, list[Problem]]:
    """Rows of the dataset, how many of them are cut at max_length, and the records that cannot be cut to it."""
    rows, num_cut, problems = [], 0, []
    layout_of = choose_layout(processor, records, reports)
    for record in tqdm(records, desc="counting tokens", unit="sample", mininterval=1):
        try:
            layout = layout_of(record)
        except jinja2.TemplateError as error:
            problems.append(Problem(record["id"], "", "not for this chat template", str(error)))
            continue
        ends = layout.widths.cumsum()
        length = f"{ends[-1]} tokens, max_length {max_length}"
        if ends[layout.is_image].max(initial=0) > max_length:
            problems.append(Problem(record["id"], "", "image tokens beyond max_length", length))
        elif not (layout.is_supervised & (ends <= max_length)).any():
            problems.append(Problem(record["id"], "", "nothing supervised within max_length", length))
        else:
            num_cut += int(ends[-1] > max_length)
            rows.append({**record, "num_tokens": min(int(ends[-1]), max_length)})
    return rows, num_cut, problems


def choose_layout(
    processor: ProcessorMixin, records: Sequence[dict[str, Any]], reports: dict[str, ImageReport]
) -> Callable[[dict[str, Any]], Layout]:
    """`layout_by_size`, many times faster, if it gives this processor's very lengths; else `layout_by_pixels`."""
    exact = partial(layout_by_pixels, processor)
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        return exact
    usable = [report for report in reports.values() if report.reason is None]
    sizes = [(report.height, report.width) for report in usable]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    quick = partial(layout_by_size, processor, dict(zip([report.path for report in usable], counts, strict=True)))
    sample = next((record for record in records if record["images"]), None)
    if sample is not None and quick(sample).widths.sum() != exact(sample).widths.sum():
        return exact
    return quick


def layout_by_size(processor: ProcessorMixin, num_image_tokens: dict[str, int], record: dict[str, Any]) -> Layout:
    """The layout of a record from its images' numbers of tokens, each image being one token of the text.

    Follows `ProcessorMixin.apply_chat_template`: the same template, the same rule about the tokenizer's special tokens
    and the same about which tokens a `{% generation %}` block covers.
    """
    tokenizer = processor.tokenizer
    (text,), (spans,) = render_jinja_template(
        conversations=[record["messages"]],
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    has_start = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not has_start, return_offsets_mapping=True)
    starts, ends = np.array(encoded["offset_mapping"]).T
    is_supervised = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        is_supervised |= (starts < end) & (ends > start)
    is_image = np.array(encoded["input_ids"]) == processor.image_token_id
    widths = np.ones(len(starts), dtype=np.int64)
    widths[is_image] = [num_image_tokens[path] for path in record["images"]]
    return Layout(widths, is_image, is_supervised)


def layout_by_pixels(processor: ProcessorMixin, record: dict[str, Any]) -> Layout:
    """The layout of a record as the collator makes it, images and all."""
    batch = ConversationCollator(processor)([record])
    ids, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
    return Layout(np.ones_like(ids), ids == processor.image_token_id, labels != IGNORE_INDEX)


def check_share(recipe: DataRecipe, problems: list[Problem], num_total: int) -> None:
    """Raise PreparationError if more samples are unusable than the recipe allows, or all of them."""
    allowed = recipe.max_dropped_share * num_total
    if len(problems) <= allowed and len(problems) < num_total:
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in count_reasons(problems).items())
    listed = "".join(
        f"\n  {problem.id}: {problem.reason} {problem.detail} {problem.file}".rstrip()
        for problem in problems[:NUM_LISTED]
    )
    raise PreparationError(
        f"{recipe.annotations}: {len(problems)} of {num_total} samples cannot be used, and max_dropped_share "
        f"{recipe.max_dropped_share} allows {int(allowed)}: {reasons}; the first of them:{listed}"
    )


def count_reasons(problems: Iterable[Problem]) -> dict[str, int]:
    """Reason -> number of samples, the most frequent first."""
    return dict(Counter(problem.reason for problem in problems).most_common())


def make_manifest(
    rows: list[dict[str, Any]], problems: list[Problem], reports: dict[str, ImageReport], num_cut: int
) -> dict[str, Any]:
    """What manifest.json says: samples kept and dropped, images converted to RGB."""
    converted = [report for report in reports.values() if report.reason is None and report.mode != "RGB"]
    return {
        "num_samples": len(rows),
        "num_dropped": len(problems),
        "num_cut_at_max_length": num_cut,
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "dropped_by_reason": count_reasons(problems),
        "converted_by_mode": dict(Counter(f"converted from {report.mode}" for report in converted).most_common()),
        "dropped": [problem.to_dict() for problem in problems],
        "converted": [{"file": report.path, "mode": report.mode} for report in converted],
    }


def write_dataset(rows: list[dict[str, Any]], manifest: dict[str, Any], out: Path) -> None:
    """The folder `out` with the dataset and manifest.json, in one step; PreparationError if that fails."""
    try:
        with atomic_folder(out) as folder:
            Dataset.from_list(rows, features=FEATURES).save_to_disk(folder)
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise PreparationError(f"{out}: cannot be written: {error}") from error

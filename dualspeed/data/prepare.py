"""Preparation of a stage's data: annotations and images are checked once, and unusable samples are listed.

Input: a recipe (annotations, image folder, chat template, max_length) and a model's processor. Output: a folder with a
`datasets` dataset of rows {id, messages, images, num_tokens, num_image_tokens}, and manifest.json, which lists every
dropped sample with the reason. Held-out samples are written likewise to its VALIDATION_FOLDER. The folder appears
complete or not at all.

Data streams in chunks: threads check the images of the next chunks while the tokens of one chunk are counted. Images
inside the annotations (parquet) are written to the image folder once.
"""

import json
import os.path
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm
from transformers import ProcessorMixin

from dualspeed.data.annotations import Entry, count_entries, is_parquet, read_entries
from dualspeed.data.conversations import Problem, read_record
from dualspeed.data.images import ImageReport, find_image, inspect_image
from dualspeed.data.lengths import TokensOf, choose_method, tokens_by_size, truncated_length
from dualspeed.data.manifest import Tally, check_share
from dualspeed.data.processing import load_processor
from dualspeed.errors import AnnotationsError, PreparationError
from dualspeed.files import atomic_folder, write_atomic
from dualspeed.layout import VALIDATION_FOLDER
from dualspeed.settings.recipe import DataRecipe

FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Value("string")),
        "num_tokens": Value("int32"),
        "num_image_tokens": Value("int32"),
    }
)

CHUNK_SIZE = 128
"""Samples that are counted, written and checked against max_dropped_share at once."""
CHUNKS_AHEAD = 2
"""Chunks whose images are checked in advance."""
ROWS_IN_MEMORY = 10_000
"""Rows written at once. Datasets up to this size are the same, byte for byte, as those made in memory."""

ImageReports = list[tuple[str, ImageReport]]
"""Image paths of a sample, as the annotations have them, each with its report."""
Chunk = list[tuple[dict[str, Any] | Problem, ImageReports]]
"""Samples, or the problems of their entries, with their images."""


def prepare_dataset(recipe: DataRecipe, model: str | Path, out: str | Path, workers: int = 1) -> dict[str, Any]:
    """Write the dataset of `recipe` for the model in folder `model` to the folder `out`; returns the manifest.

    Samples with missing or unusable images, without text or answers, or without supervised tokens within max_length are
    dropped and listed.

    Args:
        workers: threads that check images.

    Raises:
        PreparationError: a folder is missing, the disk is full, or too large a share of the samples is unusable.
        AnnotationsError: the annotations can't be read.
    """
    model, out = Path(model), Path(out)
    check_folders(recipe, model, out)
    tally = Tally(count_entries(Path(recipe.annotations)))
    if not tally.num_total:
        raise AnnotationsError(f"{recipe.annotations}: has no entry; valid: LLaVA conversations as JSON or parquet")
    processor = load_processor(model, recipe.chat_template, recipe.image_aspect_ratio)
    try:
        with atomic_folder(out) as folder:
            if (held_out := recipe.validation_annotations) is not None:
                validation = replace(recipe, annotations=held_out, validation_annotations=None)
                prepare_dataset(validation, model, folder / VALIDATION_FOLDER, workers)
            write_rows(usable_rows(recipe, processor, workers, tally), folder)
            manifest = json.dumps(tally.manifest(), indent=1) + "\n"
            (folder / "manifest.json").write_text(manifest, encoding="utf-8")
    except OSError as error:
        raise PreparationError(f"{out}: cannot be written: {error}") from error
    return tally.manifest()


def check_folders(recipe: DataRecipe, model: Path, out: Path) -> None:
    """Raise PreparationError for a missing input or a full disk, before any work."""
    annotations, images = Path(recipe.annotations), Path(recipe.images)
    if not os.path.exists(annotations):  # Path.exists fails at a name that is too long
        raise PreparationError(
            f"annotations: {annotations} does not exist; valid: LLaVA conversations, JSON or parquet"
        )
    if is_parquet(annotations):
        try:
            images.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PreparationError(f"images: {images} cannot be created: {error}") from error
    if not images.is_dir():
        raise PreparationError(f"images: {images} is not a folder; valid: the folder that image paths start from")
    if not model.is_dir():
        raise PreparationError(f"model: {model} is not a folder; valid: a checkpoint with its processor")
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    # The dataset holds about as many bytes as JSON annotations, and its rows are written twice.
    needed = 0 if is_parquet(annotations) else 3 * annotations.stat().st_size
    if free < needed:
        raise PreparationError(f"{out}: {needed / 1e6:.0f} MB are needed and the disk has {free / 1e6:.0f} MB left")


def write_rows(rows: Iterable[dict[str, Any]], folder: Path) -> None:
    """Save the rows as a dataset in `folder`, with at most ROWS_IN_MEMORY of them in memory."""
    stream = folder / "streamed" / "rows.arrow"  # a dataset can't be saved to the folder that it was read from
    stream.parent.mkdir()
    writer = ArrowWriter(features=FEATURES, path=str(stream), writer_batch_size=ROWS_IN_MEMORY)
    try:
        for row in rows:
            writer.write(row)
        writer.finalize()
    finally:
        writer.close()
    Dataset.from_file(str(stream)).save_to_disk(folder)
    shutil.rmtree(stream.parent)


def usable_rows(recipe: DataRecipe, processor: ProcessorMixin, workers: int, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the rows of the dataset, and count them and the dropped samples in the tally.

    Raises:
        PreparationError: too many samples are unusable.
    """
    tokens_of: TokensOf | None = None
    max_length = recipe.max_length
    progress = tqdm(total=tally.num_total, desc="checking samples", unit="sample", mininterval=1)
    with progress, ThreadPoolExecutor(workers) as pool:
        try:
            for chunk in inspected_chunks(recipe, pool):
                records, reports = split_by_images(chunk, tally)
                sample = next((record for record in records if record["images"]), None)
                if tokens_of is None and sample is not None:
                    tokens_of = choose_method(processor, sample, reports)
                sequences = (tokens_of or tokens_by_size)(processor, records, reports)
                for record, tokens in zip(records, sequences, strict=True):
                    length = tokens if isinstance(tokens, Problem) else truncated_length(record, tokens, max_length)
                    if isinstance(length, Problem):
                        tally.problems.append(length)
                        continue
                    tally.num_samples += 1
                    tally.num_tokens += length.num_tokens
                    tally.num_cut += length.is_cut
                    yield {**record, "num_tokens": length.num_tokens, "num_image_tokens": length.num_image_tokens}
                tally.num_seen += len(chunk)
                progress.update(len(chunk))
                check_share(recipe, tally)
        except OSError as error:  # here, where nothing is written to the dataset, it is one of input
            raise PreparationError(f"{recipe.annotations}: its samples cannot be read: {error}") from error
        finally:
            pool.shutdown(cancel_futures=True)


def inspected_chunks(recipe: DataRecipe, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
    """Yield the samples in chunks, with reports on their images; each image is opened once."""
    images = Path(recipe.images)
    seen: dict[str, ImageReport | Future] = {}
    waiting: deque[list] = deque()

    def submit(entry: Entry) -> tuple[dict[str, Any] | Problem, list[str], list[Future]]:
        record = read_record(entry, images)
        if isinstance(record, Problem):
            return record, [], []
        if entry.image is not None:
            return (
                record,
                record["images"],
                [pool.submit(extract_image, path, entry.image, recipe.max_image_pixels) for path in record["images"]],
            )
        for path in record["images"]:
            if path not in seen:
                seen[path] = pool.submit(find_and_inspect, path, recipe.max_image_pixels)
        return record, record["images"], []

    def collect(chunk: list) -> Chunk:
        collected = []
        for record, paths, extracted in chunk:
            for path in paths:
                if not extracted and isinstance(pending := seen[path], Future):
                    seen[path] = pending.result()
            reports = [future.result() for future in extracted] or [seen[path] for path in paths]
            collected.append((record, list(zip(paths, reports, strict=True))))
        return collected

    entries = read_entries(Path(recipe.annotations))
    for chunk in iter(partial(lambda: list(islice(entries, CHUNK_SIZE))), []):
        waiting.append([submit(entry) for entry in chunk])
        if len(waiting) > CHUNKS_AHEAD:
            yield collect(waiting.popleft())
    while waiting:
        yield collect(waiting.popleft())


def find_and_inspect(path: str, max_pixels: int) -> ImageReport:
    """Find the image that the annotations name `path` and report on it."""
    return inspect_image(find_image(path), max_pixels)


def extract_image(path: str, content: bytes, max_pixels: int) -> ImageReport:
    """Write an image from the annotations to `path`, unless just that is there, and report on it.

    Atomic, since another stage that shares the folder may write or read the same image.

    Raises:
        PreparationError: it can't be written.
    """
    file = Path(path)
    try:
        if not (file.is_file() and file.read_bytes() == content):
            write_atomic(file, content)
    except OSError as error:
        raise PreparationError(f"images: {file} cannot be written: {error.strerror or error}") from error
    return inspect_image(file, max_pixels)


def split_by_images(chunk: Chunk, tally: Tally) -> tuple[list[dict[str, Any]], dict[str, ImageReport]]:
    """Return the records whose images are all usable, and the reports on these images.

    The other samples become problems of the tally, each with its first unusable image.
    """
    usable: list[dict[str, Any]] = []
    usable_reports: dict[str, ImageReport] = {}
    for record, reports in chunk:
        for path, report in reports:
            if report.reason is None and report.mode != "RGB":
                tally.converted[report.path] = report.mode
            if report.path != path:
                tally.renamed[path] = report.path
            if report.reason is None:
                tally.checksums[report.path] = report.checksum
        unusable = next((report for _, report in reports if report.reason), None)
        if isinstance(record, Problem):
            tally.problems.append(record)
        elif unusable is not None:
            problem = Problem(record["id"], unusable.path, f"image: {unusable.reason}", unusable.detail)
            tally.problems.append(problem)
        else:
            usable.append({**record, "images": [report.path for _, report in reports]})
            usable_reports |= {report.path: report for _, report in reports}
    return usable, usable_reports

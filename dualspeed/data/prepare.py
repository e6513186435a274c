"""Preparation of a stage's data: annotations and images are checked once, and unusable samples are listed.

Input: a recipe (annotations, image folder, chat template, max_length) and a model's processor. Output: a folder with a
`datasets` dataset of rows {id, messages, images, num_tokens, num_image_tokens}, and manifest.json, which lists every
dropped sample with the reason. Held-out samples are written likewise to its VALIDATION_FOLDER. The folder appears
complete or not at all.

Data streams in chunks: threads check the images of the next chunks while the tokens of one chunk are counted. Images
inside the annotations (parquet) are written to the image folder once, and those of `data` without such a folder to
ROW_IMAGES in the prepared folder.
"""

import json
import logging
import os.path
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

from dualspeed.data.annotations import is_parquet
from dualspeed.data.conversations import Problem
from dualspeed.data.images import ImageReport, find_image, inspect_image
from dualspeed.data.lengths import TokensOf, choose_method, tokens_by_size, truncated_length
from dualspeed.data.manifest import Tally, check_share
from dualspeed.data.processing import load_processor
from dualspeed.data.samples import Sample, SampleStream, open_samples
from dualspeed.errors import PreparationError
from dualspeed.files import atomic_folder, write_atomic
from dualspeed.layout import VALIDATION_FOLDER
from dualspeed.settings.recipe import DataRecipe

logger = logging.getLogger(__name__)

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

ROW_IMAGES = "images"
"""Folder in a prepared one: images of rows whose source names no folder for them."""

ImageReports = list[tuple[str, ImageReport]]
"""Image paths of a sample, as the annotations have them, each with its report."""
Chunk = list[tuple[Sample, ImageReports]]
"""Samples with their images."""
Place = Callable[[str], str]
"""Function of the path of an image that gives the one under which it is there once the preparation is whole."""


def prepare_dataset(recipe: DataRecipe, model: str | Path, out: str | Path, workers: int = 1) -> dict[str, Any]:
    """Write the dataset of `recipe` for the model in folder `model` to the folder `out`; returns the manifest.

    Samples with missing or unusable images, without text or answers, or without supervised tokens within max_length are
    dropped and listed.

    Args:
        workers: threads that check images.

    Raises:
        PreparationError: a folder is missing, the disk is full, or too large a share of the samples is unusable.
        AnnotationsError: the data can't be read.
        DownloadError: the Hub refuses.
    """
    model, out = Path(model), Path(out)
    check_folders(recipe, model, out)
    processor = load_processor(model, recipe.chat_template, recipe.image_aspect_ratio)
    try:
        with atomic_folder(out) as folder:
            stream = open_samples(recipe, folder / ROW_IMAGES)
            tally = Tally(stream.num_total, stream.sources)
            if (held_out := recipe.validation_annotations) is not None:
                validation = replace(recipe, annotations=held_out, data=(), validation_annotations=None)
                prepare_dataset(validation, model, folder / VALIDATION_FOLDER, workers)

            def place(path: str) -> str:
                return str(out / Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path

            write_rows(usable_rows(recipe, stream, processor, workers, tally, place), folder)
            if tally.problems:
                logger.warning("%s; manifest.json lists them", tally.dropped())
            manifest = json.dumps(tally.manifest(), indent=1) + "\n"
            (folder / "manifest.json").write_text(manifest, encoding="utf-8")
    except OSError as error:
        raise PreparationError(f"{out}: cannot be written: {error}") from error
    return tally.manifest()


def check_folders(recipe: DataRecipe, model: Path, out: Path) -> None:
    """Raise PreparationError for a missing input or a full disk, before any work."""
    files: dict[str, tuple[str, str | None]]
    if recipe.annotations:
        files = {"annotations": (recipe.annotations, recipe.images)}
    else:
        sources = [(f"data[{number}].path", source) for number, source in enumerate(recipe.data) if source.path]
        files = {key: (str(source.path), recipe.images_of(source)) for key, source in sources}
    needed = 0
    for key, (path, images) in files.items():
        if not os.path.exists(path):  # Path.exists fails at a name that is too long
            raise PreparationError(f"{key}: {path} does not exist; valid: conversations, JSON or parquet")
        if images is not None:
            check_images(Path(path), Path(images))
        # The dataset holds about as many bytes as JSON annotations, and its rows are written twice.
        needed += 0 if is_parquet(Path(path)) else 3 * Path(path).stat().st_size
    if not model.is_dir():
        raise PreparationError(f"model: {model} is not a folder; valid: a checkpoint with its processor")
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise PreparationError(f"{out}: {needed / 1e6:.0f} MB are needed and the disk has {free / 1e6:.0f} MB left")


def check_images(path: Path, images: Path) -> None:
    """Raise PreparationError unless the folder of images is there, or can be made for those in the data itself."""
    if is_parquet(path):
        try:
            images.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PreparationError(f"images: {images} cannot be created: {error}") from error
    if not images.is_dir():
        raise PreparationError(f"images: {images} is not a folder; valid: the folder that image paths start from")


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


def usable_rows(
    recipe: DataRecipe, stream: SampleStream, processor: ProcessorMixin, workers: int, tally: Tally, place: Place
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the dataset, and count them and the dropped samples in the tally.

    Raises:
        PreparationError: too many samples are unusable.
    """
    tokens_of: TokensOf | None = None
    max_length = recipe.max_length
    progress = tqdm(total=tally.num_total, desc="checking samples", unit="sample", mininterval=1)
    with progress, ThreadPoolExecutor(workers) as pool:
        try:
            for chunk in inspected_chunks(stream, pool, recipe.max_image_pixels):
                usable, reports = split_by_images(chunk, tally, place)
                records = [record for record, _ in usable]
                sample = next((record for record in records if record["images"]), None)
                if tokens_of is None and sample is not None:
                    tokens_of = choose_method(processor, sample, reports)
                sequences = (tokens_of or tokens_by_size)(processor, records, reports)
                for (record, source), tokens in zip(usable, sequences, strict=True):
                    length = tokens if isinstance(tokens, Problem) else truncated_length(record, tokens, max_length)
                    if isinstance(length, Problem):
                        tally.drop(length, source)
                        continue
                    tally.keep(length, source)
                    yield {
                        **record,
                        "images": [place(path) for path in record["images"]],
                        "num_tokens": length.num_tokens,
                        "num_image_tokens": length.num_image_tokens,
                    }
                tally.num_seen += len(chunk)
                progress.update(len(chunk))
                check_share(recipe, tally)
            tally.num_total = tally.num_seen
            check_share(recipe, tally)
        except OSError as error:  # here, where nothing is written to the dataset, it is one of input
            raise PreparationError(f"{recipe.data_name}: its samples cannot be read: {error}") from error
        finally:
            pool.shutdown(cancel_futures=True)


def inspected_chunks(stream: SampleStream, pool: ThreadPoolExecutor, max_pixels: int) -> Iterator[Chunk]:
    """Yield the samples in chunks, with reports on their images; each image file is opened once."""
    seen: dict[str, ImageReport | Future[ImageReport]] = {}
    waiting: deque[list] = deque()

    def submit(sample: Sample) -> tuple[Sample, list[str], dict[str, Future[ImageReport]]]:
        paths = [] if isinstance(sample.record, Problem) else sample.record["images"]
        written = {
            path: pool.submit(extract_image, path, content, max_pixels) for path, content in sample.contents.items()
        }
        for path in paths:
            if path not in written and path not in seen:
                seen[path] = pool.submit(find_and_inspect, path, max_pixels)
        # What was written is not needed any more, and chunks wait in memory.
        return replace(sample, contents={}), paths, written

    def report_on(path: str, written: dict[str, Future[ImageReport]]) -> ImageReport:
        if path in written:
            return written[path].result()
        if isinstance(report := seen[path], Future):
            report = seen[path] = report.result()
        return report

    def collect(chunk: list) -> Chunk:
        return [(sample, [(path, report_on(path, written)) for path in paths]) for sample, paths, written in chunk]

    for chunk in iter(partial(lambda: list(islice(stream.samples, CHUNK_SIZE))), []):
        waiting.append([submit(sample) for sample in chunk])
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


def split_by_images(
    chunk: Chunk, tally: Tally, place: Place
) -> tuple[list[tuple[dict[str, Any], str]], dict[str, ImageReport]]:
    """Return the records whose images are all usable, each with its source, and the reports on these images.

    The other samples become problems of the tally, each with its first unusable image.
    """
    usable: list[tuple[dict[str, Any], str]] = []
    usable_reports: dict[str, ImageReport] = {}
    for sample, reports in chunk:
        for path, report in reports:
            if report.reason is None and report.mode != "RGB":
                tally.converted[place(report.path)] = report.mode
            if report.path != path:
                tally.renamed[place(path)] = place(report.path)
            if report.reason is None:
                tally.checksums[place(report.path)] = report.checksum
        unusable = next((report for _, report in reports if report.reason), None)
        if isinstance(sample.record, Problem):
            tally.drop(sample.record, sample.source)
        elif unusable is not None:
            reason, file = f"image: {unusable.reason}", place(unusable.path)
            tally.drop(Problem(sample.record["id"], file, reason, unusable.detail), sample.source)
        else:
            usable.append((sample.record | {"images": [report.path for _, report in reports]}, sample.source))
            usable_reports |= {report.path: report for _, report in reports}
    return usable, usable_reports

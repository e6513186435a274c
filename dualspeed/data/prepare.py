"""Preparation of a stage's data: annotations and images are checked once, and what cannot be trained on is listed.

Enters: a recipe (annotations, image folder, chat template, max_length) and a model's processor. Leaves: a folder with a
`datasets` dataset of rows {id, messages, images, num_tokens, num_image_tokens} and manifest.json, which names every
sample that was dropped and why; held-out samples likewise, in its VALIDATION_FOLDER. The folder appears whole or not
at all.

Everything streams, chunk by chunk: threads look at the images of the next chunks while this one's tokens are counted.
Images that lie in the annotations themselves (parquet) are written to the image folder, once.
"""

import json
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
from dualspeed.data.lengths import LayoutsOf, choose_layouts, fit, layouts_by_size
from dualspeed.data.processing import load_processor
from dualspeed.errors import AnnotationsError, PreparationError
from dualspeed.files import atomic_folder
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

VALIDATION_FOLDER = "validation"
"""Of the held-out samples, in a stage's prepared data."""
CHUNK = 128
"""Samples that are counted, written and checked against max_dropped_share at once."""
CHUNKS_AHEAD = 2
"""Chunks whose images are looked at meanwhile."""
ROWS_IN_MEMORY = 10_000
"""Rows that are written at once. Data sets up to this size are the same, byte for byte, as those made in memory."""
NUM_LISTED = 10
"""Dropped samples that an error quotes; the manifest lists all."""


@dataclass
class Tally:
    """What has been kept and dropped so far; the manifest in the making."""

    num_total: int
    num_seen: int = 0
    num_samples: int = 0
    num_cut: int = 0
    num_tokens: int = 0
    problems: list[Problem] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    """Image path -> pixel mode, where that isn't RGB."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Image path in the annotations -> where the image was found."""

    def manifest(self) -> dict[str, Any]:
        """What manifest.json says."""
        modes = Counter(f"converted from {mode}" for mode in self.converted.values())
        return {
            "num_samples": self.num_samples,
            "num_dropped": len(self.problems),
            "num_cut_at_max_length": self.num_cut,
            "num_tokens": self.num_tokens,
            "dropped_by_reason": count_reasons(self.problems),
            "converted_by_mode": dict(modes.most_common()),
            "dropped": [problem.to_dict() for problem in self.problems],
            "converted": [{"file": path, "mode": mode} for path, mode in self.converted.items()],
            "renamed": [{"file": path, "found": found} for path, found in self.renamed.items()],
        }


def prepare_dataset(recipe: DataRecipe, model: str | Path, out: str | Path, workers: int = 1) -> dict[str, Any]:
    """Write the dataset of `recipe` for the model in folder `model` to the folder `out`; returns the manifest.

    `workers` threads check images. Samples that need images, text or answers which are not there, or that have
    nothing supervised within max_length, are dropped and listed.

    Raises:
        PreparationError: a folder is missing, the disk is full, or too large a share of the samples is unusable.
        AnnotationsError: the annotations cannot be read at all.
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
    """Raise PreparationError, before any work, for a missing input or a full disk."""
    annotations, images = Path(recipe.annotations), Path(recipe.images)
    if not annotations.exists():
        raise PreparationError(
            f"annotations: {annotations} does not exist; valid: LLaVA conversations, JSON or parquet"
        )
    if is_parquet(annotations):
        try:
            images.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PreparationError(f"images: {images} cannot be made: {error}") from error
    if not images.is_dir():
        raise PreparationError(f"images: {images} is not a folder; valid: the folder that image paths start from")
    if not model.is_dir():
        raise PreparationError(f"model: {model} is not a folder; valid: a checkpoint with its processor")
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    # The dataset holds what JSON annotations hold, in Arrow's form; its rows are written twice.
    needed = 0 if is_parquet(annotations) else 3 * annotations.stat().st_size
    if free < needed:
        raise PreparationError(f"{out}: {needed / 1e6:.0f} MB are needed and the disk has {free / 1e6:.0f} MB left")


def write_rows(rows: Iterable[dict[str, Any]], folder: Path) -> None:
    """Save the rows as a dataset in `folder`, with no more than a batch of them in memory."""
    stream = folder / "streamed" / "rows.arrow"  # datasets saves none to the folder that it was read from
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
    """Rows of the dataset; what is dropped goes to the tally. PreparationError once that is too much."""
    layouts_of: LayoutsOf | None = None
    progress = tqdm(total=tally.num_total, desc="checking samples", unit="sample", mininterval=1)
    with progress, ThreadPoolExecutor(workers) as pool:
        try:
            for chunk in inspected_chunks(recipe, pool):
                records, reports = split_by_images(chunk, tally)
                sample = next((record for record in records if record["images"]), None)
                if layouts_of is None and sample is not None:
                    layouts_of = choose_layouts(processor, sample, reports)
                layouts = (layouts_of or layouts_by_size)(processor, records, reports)
                for record, layout in zip(records, layouts, strict=True):
                    fitted = layout if isinstance(layout, Problem) else fit(record, layout, recipe.max_length)
                    if isinstance(fitted, Problem):
                        tally.problems.append(fitted)
                        continue
                    num_tokens, is_cut, num_image_tokens = fitted
                    tally.num_samples += 1
                    tally.num_tokens += num_tokens
                    tally.num_cut += is_cut
                    yield {**record, "num_tokens": num_tokens, "num_image_tokens": num_image_tokens}
                tally.num_seen += len(chunk)
                progress.update(len(chunk))
                check_share(recipe, tally)
        finally:
            pool.shutdown(cancel_futures=True)


Chunk = list[tuple[dict[str, Any] | Problem, list[tuple[str, ImageReport]]]]


def inspected_chunks(recipe: DataRecipe, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
    """The samples, a chunk at a time, each with its image paths and their reports; each image is opened once."""
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
                [pool.submit(extract_image, path, entry.image) for path in record["images"]],
            )
        for path in record["images"]:
            if path not in seen:
                seen[path] = pool.submit(find_and_inspect, path)
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
    for chunk in iter(partial(lambda: list(islice(entries, CHUNK))), []):
        waiting.append([submit(entry) for entry in chunk])
        if len(waiting) > CHUNKS_AHEAD:
            yield collect(waiting.popleft())
    while waiting:
        yield collect(waiting.popleft())


def find_and_inspect(path: str) -> ImageReport:
    """Report on the image that the annotations call `path`."""
    return inspect_image(find_image(path))


def extract_image(path: str, content: bytes) -> ImageReport:
    """Write an image from the annotations to `path`, unless it is there, and report on it."""
    file = Path(path)
    if not (file.is_file() and file.stat().st_size == len(content)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return inspect_image(file)


def split_by_images(chunk: Chunk, tally: Tally) -> tuple[list[dict[str, Any]], dict[str, ImageReport]]:
    """Records whose images are all usable, and the reports on these; every other one is a problem (first bad image)."""
    usable: list[dict[str, Any]] = []
    usable_reports: dict[str, ImageReport] = {}
    for record, reports in chunk:
        for path, report in reports:
            if report.reason is None and report.mode != "RGB":
                tally.converted[report.path] = report.mode
            if report.path != path:
                tally.renamed[path] = report.path
        bad = next((report for _, report in reports if report.reason), None)
        if isinstance(record, Problem):
            tally.problems.append(record)
        elif bad is not None:
            tally.problems.append(Problem(record["id"], bad.path, f"image: {bad.reason}", bad.detail))
        else:
            usable.append({**record, "images": [report.path for _, report in reports]})
            usable_reports |= {report.path: report for _, report in reports}
    return usable, usable_reports


def check_share(recipe: DataRecipe, tally: Tally) -> None:
    """Raise PreparationError as soon as more samples are unusable than the recipe allows, or if all of them are."""
    problems, allowed = tally.problems, recipe.max_dropped_share * tally.num_total
    if len(problems) <= allowed and len(problems) < tally.num_total:
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in count_reasons(problems).items())
    listed = "".join(
        f"\n  {problem.id}: {problem.reason} {problem.detail} {problem.file}".rstrip()
        for problem in problems[:NUM_LISTED]
    )
    so_far = "" if tally.num_seen == tally.num_total else f" (of {tally.num_total}, where preparation stopped)"
    raise PreparationError(
        f"{recipe.annotations}: {len(problems)} of {tally.num_seen} samples{so_far} cannot be used, and "
        f"max_dropped_share {recipe.max_dropped_share} allows {int(allowed)}: {reasons}; the first of them:{listed}"
    )


def count_reasons(problems: Iterable[Problem]) -> dict[str, int]:
    """Reason -> number of samples, the most frequent first."""
    return dict(Counter(problem.reason for problem in problems).most_common())

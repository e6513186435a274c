"""Paths of a configuration that nothing makes: they have to be there when it is read.

Otherwise a mistyped path would show hours later, or never: Snakemake takes what an earlier run made from the right one
as done. A path is made by a download, by the demo's rules, or, for the images inside parquet files, by preparation.
"""

import os.path
from collections.abc import Iterator, Mapping
from pathlib import Path

from dualspeed.errors import ConfigError
from dualspeed.settings.model import ModelConfig
from dualspeed.settings.reading import quote
from dualspeed.settings.recipe import PARQUET_SUFFIXES
from dualspeed.settings.sources import Source, sources_of

LONGEST_PART, LONGEST_RESULTS = 255, 3000
"""Bytes of a folder's name, and of the absolute path of results: Linux allows 4096 with all that comes behind it."""


def check_results(folder: str) -> None:
    """Raise ConfigError unless the folder of results can be one, for Python, Snakemake and shells alike."""
    check_no_wildcard("results", folder)
    if not folder.strip() or any(ord(character) < 32 for character in folder):
        raise ConfigError(f"results: {quote(folder)} is no folder's name; valid: a path in one line")
    if folder.startswith("~"):
        raise ConfigError(f"results: {quote(folder)}: only shells know '~'; valid: the path from /")
    too_long = [part for part in Path(folder).parts if len(part.encode()) > LONGEST_PART]
    length = len(str(Path(folder).absolute()).encode())
    if too_long or length > LONGEST_RESULTS:
        valid = f"valid: at most {LONGEST_PART} bytes for each folder, {LONGEST_RESULTS} from / on"
        raise ConfigError(f"results: {quote(folder)} is too long ({length} bytes from / on); {valid}")


def check_no_wildcard(key: str, path: str) -> None:
    """Raise ConfigError for a path in which Snakemake would see a wildcard."""
    if "{" in path or "}" in path:
        raise ConfigError(f"{key}: {quote(path)} has a brace, which Snakemake takes for a wildcard; valid: none")


def check_paths(
    models: Mapping[str, ModelConfig], benchmarks: Mapping[str, str], downloads: Mapping[str, Source], demo_data: str
) -> None:
    """Raise ConfigError at the first path that nothing makes and that isn't there, or is no folder where one belongs.

    Args:
        benchmarks: name -> folder.
        demo_data: folder of the demo's data.
    """
    named = [
        *(
            (f"models.{name}.{key}", path, False)
            for name, model in models.items()
            for key, path in model.inputs.items()
        ),
        *(item for name, model in models.items() for item in data_paths(f"models.{name}.stages", model)),
        *((f"benchmarks.{name}.folder", folder, True) for name, folder in benchmarks.items()),
    ]
    for key, path, is_folder in named:
        if sources_of(path, dict(downloads)) or Path(demo_data).absolute() in Path(path).absolute().parents:
            continue
        if not os.path.exists(path):  # Path.exists fails at a name that is too long
            raise ConfigError(f"{key}: {path!r} does not exist; valid: what exists, or a download")
        if is_folder and not os.path.isdir(path):
            raise ConfigError(f"{key}: {path!r} is not a folder; valid: a folder")


def data_paths(place: str, model: ModelConfig) -> Iterator[tuple[str, str, bool]]:
    """Yield (key, path, True if it must be a folder) of the data of a model's stages."""
    for stage, recipe in model.stages.recipes.items():
        if recipe.annotations:
            yield f"{place}.{stage}.annotations", recipe.annotations, False
        if recipe.validation_annotations is not None:
            yield f"{place}.{stage}.validation_annotations", recipe.validation_annotations, False
        needs_images = bool(recipe.annotations) and not holds_images(recipe.annotations)
        for number, source in enumerate(recipe.data):
            if source.path is not None:
                yield f"{place}.{stage}.data[{number}].path", source.path, False
            if source.path is not None and not holds_images(source.path):
                needs_images |= source.images is None and bool(recipe.images)
                if source.images is not None:
                    yield f"{place}.{stage}.data[{number}].images", source.images, True
        if needs_images:
            yield f"{place}.{stage}.images", recipe.images, True


def holds_images(path: str) -> bool:
    """True for folders and parquet files, whose images preparation writes to a folder that it makes."""
    return os.path.isdir(path) or Path(path).suffix in PARQUET_SUFFIXES

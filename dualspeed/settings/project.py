"""Configuration: what one YAML file and one sheet of experiments say, checked before anything runs.

Enters: config/<name>/config.yaml and its experiments.tsv. Leaves: a `Project` of frozen dataclasses, or one
`ConfigError` that names file, key and the valid values. Imports neither torch nor transformers, so that Snakemake
and the command line answer at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.layout import Layout
from dualspeed.settings.demo import BaseModelSettings, SceneSettings
from dualspeed.settings.fields import number
from dualspeed.settings.model import ModelConfig, with_templates
from dualspeed.settings.names import BENCHMARK_NAMES, SERVER_FILES
from dualspeed.settings.paths import check_no_wildcard, check_paths, check_results
from dualspeed.settings.plan import PlanSettings
from dualspeed.settings.reading import check_choice, check_name, read_dataclass, read_value
from dualspeed.settings.sheet import PrunedInference, Row, Sheet, read_rows
from dualspeed.settings.sheet_file import read_sheet
from dualspeed.settings.sources import Source, check_folders
from dualspeed.settings.speed import SpeedSettings, speed_settings
from dualspeed.settings.stage import StageSettings, finetune_settings, pretrain_settings
from dualspeed.settings.yaml_file import read_yaml


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Location of a benchmark's files."""

    folder: str
    """Folder in the layout of the official evaluation files."""


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(PrunedInference):
    """Settings of answering benchmarks."""

    batch_size: int = number(above=0, default=16)
    """Questions answered at once."""
    max_new_tokens: int = number(above=0, default=16)
    """Longest answer."""
    shards: int = number(above=0, default=1)
    """Jobs that a row's questions are divided among."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow store that runs are logged to."""

    uri: str = "sqlite:///results/mlflow.db"
    """A file of SQLite (sqlite:///path), or an MLflow server (http://host:port)."""
    experiment: str
    """Name of the MLflow experiment."""

    def __post_init__(self) -> None:
        # MLflow itself takes more, but waits for minutes for a database that is away, and training would with it.
        if not self.uri.startswith(("sqlite:///", "http://", "https://")):
            scheme = self.uri.partition(":")[0]  # the rest may hold a password
            raise ConfigError(f"uri: {scheme!r} can't be used; valid: sqlite:///<path>, http(s)://<host>:<port>")


@dataclass(frozen=True, kw_only=True)
class Project:
    """A configuration file with one of its sheets."""

    name: str
    """Names the tables' folder."""
    rows: tuple[Row, ...]
    """Rows of the sheet of experiments."""
    sheet_name: str
    """`name`, and behind it what the sheet's file name adds to `experiments`: demo, demo-full."""
    tracking: TrackingConfig
    """MLflow."""
    models: dict[str, ModelConfig]
    """Base models by name."""
    benchmarks: dict[str, BenchmarkConfig]
    """Benchmarks to answer, by name."""
    results: str = "results"
    """Folder of everything that is written."""
    inference: InferenceConfig = InferenceConfig()
    """Settings of answering benchmarks."""
    downloads: dict[str, Source] = field(default_factory=dict)
    """Downloads, by name; they come before anything else."""
    plan: PlanSettings = field(default_factory=PlanSettings)
    """Assumptions of `dualspeed plan`."""
    data: SceneSettings = field(default_factory=SceneSettings)
    """The demo's data, for models whose source is `demo`."""
    base_model: BaseModelSettings = field(default_factory=BaseModelSettings)
    """The demo's base model, likewise."""

    @property
    def scored(self) -> tuple[str, ...]:
        """Benchmarks that are scored here; tables show them."""
        return tuple(name for name in self.benchmarks if name in BENCHMARK_NAMES)

    @property
    def submitted(self) -> tuple[str, ...]:
        """Benchmarks whose answers go to a server."""
        return tuple(name for name in self.benchmarks if name in SERVER_FILES)

    @property
    def sheet(self) -> Sheet:
        """All that tables, figures and reports show."""
        pruned = PrunedInference(pruner=self.inference.pruner, pruning_ratio=self.inference.pruning_ratio)
        return Sheet(
            name=self.sheet_name, results=self.results, rows=self.rows, benchmarks=self.scored, inference=pruned
        )

    def pretrain_settings(self, row: Row) -> StageSettings | None:
        """Settings of the pretraining that a row starts from; None if it starts from the base model."""
        return pretrain_settings(self.models[row.model], row.dualspeed, row.seed)

    def finetune_settings(self, row: Row) -> StageSettings:
        """Settings of the finetuning that makes a row's model."""
        return finetune_settings(self.models[row.model], row.dualspeed, row.seed, row.max_steps)

    def speed_settings(self, row: Row) -> SpeedSettings:
        """Settings of the measurement of a row's step times."""
        return speed_settings(self.models[row.model], row.dualspeed)

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_name("experiments", self.sheet_name)  # what its file's name adds names folders too
        check_results(self.results)
        for model in self.models:
            check_name("models", model)
        for download in self.downloads:
            check_name("downloads", download)
        check_folders(self.downloads)
        for benchmark in self.benchmarks:
            check_choice("benchmarks", benchmark, (*BENCHMARK_NAMES, *SERVER_FILES))
        if not self.benchmarks:
            raise ConfigError(f"benchmarks: empty; valid: some of {', '.join(BENCHMARK_NAMES)}")
        folders = {name: benchmark.folder for name, benchmark in self.benchmarks.items()}
        for name, folder in folders.items():
            check_no_wildcard(f"benchmarks.{name}.folder", folder)
        check_paths(self.models, folders, self.downloads, Layout(self.results).demo_data)


def load_project(
    config: Mapping[str, Any] | str | Path, file: str = "config", experiments: str | Path | None = None
) -> Project:
    """Read and check a configuration (its path, or its content and the `file` that errors name) and its sheet.

    Args:
        experiments: another sheet than the one that the configuration names.
    """
    if isinstance(config, str | Path):
        file, config = str(config), read_yaml(Path(config))
    values = dict(read_value(dict[str, Any], config, file, "top level"))
    own_sheet = read_value(str, values.pop("experiments", None), file, "experiments")
    sheet_path = Path(experiments or own_sheet)
    values["models"] = with_templates(values.get("models"))
    models = read_value(dict[str, ModelConfig], values["models"], file, "models")
    data = values.get("data")
    if isinstance(data, Mapping) and "source" in data:
        check_choice(f"{file}: data.source", data["source"], ("demo",))
        values["data"] = {key: value for key, value in data.items() if key != "source"}
    rows = read_rows(read_sheet(sheet_path), models, str(sheet_path))
    added = sheet_path.stem.removeprefix("experiments").strip("-")
    sheet_name = f"{values.get('name')}-{added}" if added else values.get("name")
    return read_dataclass(Project, values, file, rows=rows, sheet_name=sheet_name)

"""Configuration: what one YAML file and one sheet of experiments say, checked before anything runs.

Enters: config/<name>/config.yaml and its experiments.tsv. Leaves: a `ProjectConfig` of frozen dataclasses, or one
`ConfigError` that names file, key and the valid values. Imports neither torch nor transformers, so that Snakemake
and the command line answer at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dualspeed.errors import ConfigError
from dualspeed.settings.demo import BaseModelSettings, SceneSettings
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.model import ModelConfig
from dualspeed.settings.names import BENCHMARK_NAMES, PRUNER_NAMES, SERVER_FILES, TABLES
from dualspeed.settings.plan import PlanSettings
from dualspeed.settings.reading import check_choice, check_name, check_range, read_dataclass, read_value
from dualspeed.settings.sheet import METHODS, read_sheet, resolve_cells
from dualspeed.settings.sources import Source, check_folders, sources_of


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Where a benchmark's files lie."""

    folder: str
    """Folder in the layout of the official evaluation files."""


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """How benchmarks are answered."""

    pruner: str = "divprune"
    """Pruner of pruned inference for models that were trained without one."""
    pruning_ratio: float = 0.9
    """Its pruning ratio."""
    batch_size: int = 16
    """Questions answered at once."""
    max_new_tokens: int = 16
    """Longest answer."""
    shards: int = 1
    """Jobs that a row's questions are divided among."""

    def __post_init__(self) -> None:
        check_choice("pruner", self.pruner, PRUNER_NAMES)
        check_range("pruning_ratio", self.pruning_ratio, 0 <= self.pruning_ratio < 1, "in [0, 1)")
        check_range("batch_size", self.batch_size, self.batch_size > 0, "above 0")
        check_range("max_new_tokens", self.max_new_tokens, self.max_new_tokens > 0, "above 0")
        check_range("shards", self.shards, self.shards > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are logged."""

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
class Experiment:
    """One row of the sheet: one trained model."""

    id: str
    """Names its folders and runs."""
    model: str
    """Key of `models` in the configuration."""
    method: str
    """baseline, naive_prune or dualspeed."""
    dualspeed: DualSpeedConfig
    """What the method and the row's cells resolve to."""
    seed: int
    """Seed of training."""
    tables: tuple[str, ...]
    """Tables and figures that show this row."""

    @property
    def inferences(self) -> tuple[str, ...]:
        """How its answers are generated: on full tokens, and on pruned ones where Table 2 shows it."""
        return ("full", "pruned") if "table2" in self.tables else ("full",)


@dataclass(frozen=True, kw_only=True)
class ProjectConfig:
    """A configuration file with one of its sheets."""

    name: str
    """Names the tables' folder."""
    experiments: tuple[Experiment, ...]
    """Rows of the sheet."""
    sheet: str
    """`name` and what the sheet's file name adds to `experiments`: demo, demo-full."""
    tracking: TrackingConfig
    """MLflow."""
    models: dict[str, ModelConfig]
    """Base models by name."""
    benchmarks: dict[str, BenchmarkConfig]
    """Benchmarks to answer, by name."""
    results: str = "results"
    """Folder of everything that is written."""
    inference: InferenceConfig = InferenceConfig()
    """How benchmarks are answered."""
    downloads: dict[str, Source] = field(default_factory=dict)
    """What is downloaded before anything else, by name."""
    plan: PlanSettings = field(default_factory=PlanSettings)
    """What `dualspeed plan` assumes."""
    data: SceneSettings = field(default_factory=SceneSettings)
    """The demo's data, for models whose source is `demo`."""
    base_model: BaseModelSettings = field(default_factory=BaseModelSettings)
    """The demo's base model, likewise."""

    @property
    def scored(self) -> list[str]:
        """Benchmarks that are scored here; tables show them."""
        return [name for name in self.benchmarks if name in BENCHMARK_NAMES]

    @property
    def submitted(self) -> list[str]:
        """Benchmarks whose answers go to a server."""
        return [name for name in self.benchmarks if name in SERVER_FILES]

    def __post_init__(self) -> None:
        check_name("name", self.name)
        for name, model in self.models.items():
            check_name("models", name)
            for key, path in model.inputs.items():
                if not Path(path).exists() and not sources_of(path, self.downloads):
                    raise ConfigError(
                        f"models.{name}.{key}: {path!r} does not exist; valid: what exists, or a download"
                    )
        for download in self.downloads:
            check_name("downloads", download)
        check_folders(self.downloads)
        for benchmark in self.benchmarks:
            check_choice("benchmarks", benchmark, (*BENCHMARK_NAMES, *SERVER_FILES))
        if not self.benchmarks:
            raise ConfigError(f"benchmarks: empty; valid: some of {', '.join(BENCHMARK_NAMES)}")


def load_project(
    config: Mapping[str, Any] | str | Path, file: str = "config", experiments: str | Path | None = None
) -> ProjectConfig:
    """Read and check a configuration (its path, or its content and the `file` that errors name) and its sheet.

    Args:
        experiments: another sheet than the one that the configuration names.
    """
    if isinstance(config, str | Path):
        file = str(config)
        config = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    values = dict(read_value(dict[str, Any], config, file, "top level"))
    own_sheet = read_value(str, values.pop("experiments", None), file, "experiments")
    sheet_path = Path(experiments or own_sheet)
    models = read_value(dict[str, ModelConfig], values.get("models"), file, "models")
    data = values.get("data")
    if isinstance(data, Mapping) and "source" in data:
        check_choice(f"{file}: data.source", data["source"], ("demo",))
        values["data"] = {key: value for key, value in data.items() if key != "source"}
    rows = tuple(read_experiment(row, models, str(sheet_path)) for row in read_sheet(sheet_path))
    added = sheet_path.stem.removeprefix("experiments").strip("-")
    sheet = f"{values.get('name')}-{added}" if added else values.get("name")
    return read_dataclass(ProjectConfig, values, file, experiments=rows, sheet=sheet)


def read_experiment(row: Mapping[str, Any], models: Mapping[str, ModelConfig], file: str) -> Experiment:
    """Resolve a row's method and cells (None: empty) to settings; ConfigError names row and column."""
    where = f"{file}: row {row['id']}"
    try:
        check_name("id", row["id"], taken=("base",))
        check_choice("model", row["model"], models)
        check_choice("method", row["method"], METHODS)
        tables = tuple(name.strip() for name in (row["tables"] or "").split(",") if name.strip())
        for name in tables:
            check_choice("tables", name, TABLES)
        seed = row["seed"] or 0
        check_range("seed", seed, seed >= 0, "0 or more")
        model, cells = models[row["model"]], resolve_cells(row)
        relevance_clip = model.relevance_clip if cells.get("pruner") == "cdpruner" else None
        return Experiment(
            id=row["id"],
            model=row["model"],
            method=row["method"],
            dualspeed=DualSpeedConfig(**cells, prune_budget=model.prune_budget, relevance_clip=relevance_clip),
            seed=seed,
            tables=tables,
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None

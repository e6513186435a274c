"""A sheet of experiments: rows with the keys that their results are found by. Tables, figures and reports show one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.fields import check_fields, choice, number
from dualspeed.settings.identity import key_of
from dualspeed.settings.method import DualSpeedConfig, check_slow_steps
from dualspeed.settings.model import ModelConfig
from dualspeed.settings.names import PRUNER_NAMES, TABLES, TEXT_PRUNERS
from dualspeed.settings.reading import check_choice, check_name, check_range
from dualspeed.settings.sheet_file import METHODS, resolve_cells
from dualspeed.settings.speed import speed_key
from dualspeed.settings.stage import finetune_settings, pretrain_key, pretrain_settings

LARGEST_SEED = 2**32 - 1  # numpy's


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the sheet: one trained model."""

    id: str
    """Names its folders and runs."""
    model: str
    """Key of `models` in the configuration."""
    method: str
    """baseline, naive_prune or dualspeed."""
    dualspeed: DualSpeedConfig
    """Settings that method and cells resolve to."""
    seed: int
    """Seed of training."""
    max_steps: int | None = None
    """Steps of its finetuning; None: those of the model's recipe."""
    tables: tuple[str, ...]
    """Tables and figures that show this row."""
    pretrain_key: str | None
    """Folder name of the pretraining that it starts from, which rows with the same key share; None: it starts from the
    base model."""
    speed_key: str | None
    """File name of the measurement of its step times; None for a row that never prunes."""
    settings_hash: str
    """Key of all that trains it; with `id` it names the row's run in MLflow."""

    @property
    def slow_settings(self) -> dict[str, float | None]:
        """`slow_mode_ratio` or `slow_steps`, whichever decides its slow steps; the other is None."""
        count = self.dualspeed.slow_steps
        return {"slow_mode_ratio": self.dualspeed.slow_mode_ratio if count is None else None, "slow_steps": count}

    @property
    def inferences(self) -> tuple[str, ...]:
        """Kinds of inference: on full tokens, and on pruned ones if Table 2 shows the row."""
        return ("full", "pruned") if "table2" in self.tables else ("full",)


@dataclass(frozen=True, kw_only=True)
class PrunedInference:
    """Pruned inference of models that were trained without a pruner."""

    pruner: str = choice(PRUNER_NAMES, default="divprune")
    """Pruner of pruned inference."""
    pruning_ratio: float = number(minimum=0, below=1, default=0.9)
    """Its pruning ratio."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """All that tables, figures and reports show, and where its results lie."""

    name: str
    """Names the folders of tables and figures: demo, demo-full."""
    results: str
    """Folder of everything that is written."""
    rows: tuple[Row, ...]
    """Rows in the order of the file."""
    benchmarks: tuple[str, ...]
    """Benchmarks that are scored here."""
    inference: PrunedInference = field(default_factory=PrunedInference)
    """Pruned inference of a Baseline."""

    @property
    def root(self) -> Path:
        """Folder of everything that is written, as a path."""
        return Path(self.results)


def read_rows(sheet: list[dict[str, Any]], models: Mapping[str, ModelConfig], file: str) -> tuple[Row, ...]:
    """The rows that typed cells describe.

    Raises:
        ConfigError: an invalid cell, or two rows that train the same model: tables would count one training as two.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    for cells in sheet:
        row = read_row(cells, models, file)
        first = rows.setdefault((row.model, row.method, row.settings_hash), row)
        if first is not row:
            raise ConfigError(
                f"{file}: row {row.id}: trains the same as row {first.id}, every setting and the seed ({row.seed}) "
                "are equal; valid: one row for each training, which several tables may show"
            )
    return tuple(rows.values())


def read_row(cells: Mapping[str, Any], models: Mapping[str, ModelConfig], file: str) -> Row:
    """The row that typed cells (None: empty) describe; ConfigError names row and column."""
    try:
        check_name("id", cells["id"], taken=("base",))
        check_choice("model", cells["model"], models)
        check_choice("method", cells["method"], METHODS)
        tables = tuple(name.strip() for name in (cells["tables"] or "").split(",") if name.strip())
        for name in tables:
            check_choice("tables", name, TABLES)
        seed = cells["seed"] or 0
        check_range("seed", seed, 0 <= seed <= LARGEST_SEED, f"0 or more, at most {LARGEST_SEED}")
        model, settings = models[cells["model"]], resolve_cells(cells)
        check_slow_steps(cells)
        relevance_clip = model.relevance_clip if settings.get("pruner") in TEXT_PRUNERS else None
        dualspeed = DualSpeedConfig(
            **settings,
            prune_budget=model.prune_budget,
            relevance_clip=relevance_clip,
            pixel_pruning=None if cells["method"] == "baseline" else model.pixel_pruning,
        )
        max_steps = cells["max_steps"]
        if max_steps is not None:
            check_range("max_steps", max_steps, max_steps > 0, "above 0, or empty")
        pretrain = pretrain_settings(model, dualspeed, seed)
        stages = [] if pretrain is None else [pretrain]
        return Row(
            id=cells["id"],
            model=cells["model"],
            method=cells["method"],
            dualspeed=dualspeed,
            seed=seed,
            max_steps=max_steps,
            tables=tables,
            pretrain_key=None if pretrain is None else pretrain_key(cells["model"], pretrain),
            speed_key=None if cells["method"] == "baseline" else speed_key(cells["model"], model, dualspeed),
            settings_hash=key_of([*stages, finetune_settings(model, dualspeed, seed, max_steps)], num_digits=12),
        )
    except ConfigError as error:
        raise ConfigError(f"{file}: row {cells['id']}: {error}") from None

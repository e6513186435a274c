"""Settings of the workflow's jobs, each in a file that is named by its hash.

Snakemake compares that name with the one of the last run, so anything here that a job does not depend on would make it
run again for nothing. Settings of training are in stage.py, those of step times in speed.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.files import sha256_of_json, write_json
from dualspeed.settings.fields import check_fields, choice, number
from dualspeed.settings.identity import GENERATION, identity
from dualspeed.settings.names import BENCHMARK_NAMES, PRUNER_NAMES, SERVER_FILES, in_paper_order
from dualspeed.settings.project import BenchmarkConfig, Project
from dualspeed.settings.reading import check_choice, read_dataclass
from dualspeed.settings.sheet import Row, Sheet

INFERENCES = ("full", "pruned")
KEPT_TOKENS_PICTURES = 2


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Settings of one model's answers to all benchmarks, on full or on pruned tokens."""

    experiment: str
    """Id of the row; the model's name in answers files."""
    inference: str = choice(INFERENCES)
    """`full` or `pruned` visual tokens."""
    benchmarks: dict[str, BenchmarkConfig]
    """Folder of each benchmark's files."""
    batch_size: int = number(above=0)
    """Questions answered at once."""
    max_new_tokens: int = number(above=0)
    """Longest answer."""
    pruner: str | None = choice(PRUNER_NAMES, default=None)
    """Pruner of pruned inference, and only of it."""
    pruning_ratio: float | None = number(minimum=0, below=1, default=None)
    """Its pruning ratio."""
    threads: int | None = None
    """CPU threads; None: torch's choice."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.benchmarks:
            check_choice("benchmarks", name, (*BENCHMARK_NAMES, *SERVER_FILES))
        if self.inference == "pruned" and (self.pruner is None or self.pruning_ratio is None):
            raise ConfigError("inference: pruned needs pruner and pruning_ratio")


@dataclass(frozen=True, kw_only=True)
class KeptTokensSettings:
    """Pictures that show what each pruning method keeps, and at which ratio."""

    benchmark: str
    """Benchmark whose pictures are drawn."""
    folder: str
    """Folder of its files."""
    pruning_ratio: float
    """Ratio that every method prunes by."""
    num_pictures: int = KEPT_TOKENS_PICTURES
    """Pictures, spread evenly over the benchmark."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of a sheet's page, which shows tables, figures and examples of answers."""

    sheet: Sheet
    """Rows and where their results lie."""
    folders: dict[str, str]
    """Folder of each benchmark's files."""
    command: str
    """Command that makes all of it again."""


def answer_settings(project: Project, row: Row, inference: str) -> AnswerSettings:
    """Settings of a row's answers; a Baseline, trained without a pruner, is pruned by the project's."""
    chosen = project.inference if row.method == "baseline" else row.dualspeed
    is_pruned = inference == "pruned"
    return AnswerSettings(
        experiment=row.id,
        inference=inference,
        benchmarks=project.benchmarks,
        batch_size=project.inference.batch_size,
        max_new_tokens=project.inference.max_new_tokens,
        pruner=chosen.pruner if is_pruned else None,
        pruning_ratio=chosen.pruning_ratio if is_pruned else None,
    )


def parent_run(row: Row) -> dict[str, str]:
    """Identity of the MLflow run that a row's jobs belong to: the row and the key of all that trains it."""
    return {"row": row.id, "settings_hash": row.settings_hash}


def kept_tokens_settings(project: Project) -> KeptTokensSettings:
    """GQA's pictures where the project answers it, else those of its first benchmark."""
    names = in_paper_order(project.benchmarks)
    benchmark = "gqa" if "gqa" in names else names[0]
    return KeptTokensSettings(
        benchmark=benchmark,
        folder=project.benchmarks[benchmark].folder,
        pruning_ratio=project.inference.pruning_ratio,
    )


def report_settings(project: Project, command: str) -> ReportSettings:
    """Settings of the page of the project's sheet; `command` makes all of it again."""
    folders = {name: benchmark.folder for name, benchmark in project.benchmarks.items()}
    return ReportSettings(sheet=project.sheet, folders=folders, command=command)


def write_settings(settings: Any, folder: str | Path) -> Path:
    """Write a settings dataclass to a file of `folder` that is named by the hash of its content; the file's path."""
    content = {"kind": type(settings).__name__, "generation": GENERATION, "settings": identity(settings)}
    path = Path(folder) / f"{sha256_of_json(content)[:16]}.json"
    if not path.exists():
        write_json(path, content)
    return path


def read_settings(cls: type, path: str | Path) -> Any:
    """The `cls` that `write_settings` wrote; ConfigError for a file that is missing, broken or of another kind."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; valid: a file of settings, as the workflow writes it") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind != cls.__name__:
        raise ConfigError(f"{path}: kind {kind!r}; valid: a file of {cls.__name__}, as the workflow writes it")
    return read_dataclass(cls, content.get("settings"), str(path))

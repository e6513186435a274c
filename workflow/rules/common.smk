"""The checked configuration, the sheet's rows, and the functions and paths that rules share; no rule is here."""

import json
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from dualspeed.cluster.gpus import NUM_GPUS
from dualspeed.errors import ConfigError
from dualspeed.layout import Layout
from dualspeed.settings import jobs
from dualspeed.settings.names import SERVER_FILES
from dualspeed.settings.project import load_project
from dualspeed.settings.sheet_file import read_sheet
from dualspeed.settings.sources import sources_of

try:
    PROJECT = load_project(config, ", ".join(map(str, workflow.configfiles)))
except ConfigError as error:
    raise WorkflowError(error) from None

SHEET_TEXT = Path(config["experiments"]).read_text(encoding="utf-8")
validate(config, "../schemas/config.schema.yaml")
for row in read_sheet(Path(config["experiments"])):
    validate({column: cell for column, cell in row.items() if cell is not None}, "../schemas/experiments.schema.yaml")

# The GPUs of a profile that shares them out; a scheduler does that itself.
if "gpu" in workflow.global_resources:
    os.environ[NUM_GPUS] = str(workflow.global_resources["gpu"].value)

# Jobs find `dualspeed` beside this Python, activated or not. OpenMP's spinning makes busy cores ten times slower; memory
# that glibc returned to the system would be paged in again by every training step.
PYTHON_FOLDER = shlex.quote(str(Path(sys.executable).parent)).replace("{", "{{").replace("}", "}}")
shell.prefix(
    f'export PATH={PYTHON_FOLDER}:"$PATH" OMP_WAIT_POLICY=PASSIVE '
    f"MALLOC_MMAP_THRESHOLD_={2**30} MALLOC_TRIM_THRESHOLD_={2**33}; "
)

LAYOUT = Layout(PROJECT.results)
STATE = LAYOUT.state

ROWS = {row.id: row for row in PROJECT.rows}
PRETRAININGS = {row.pretrain_key: row for row in PROJECT.rows if row.pretrain_key}
SPEEDS = {row.speed_key: row for row in PROJECT.rows if row.speed_key}
DEMO_MODELS = [name for name, model in PROJECT.models.items() if model.source == "demo"]
ASSEMBLED_MODELS = [name for name, model in PROJECT.models.items() if model.source == "parts"]
DOWNLOADED_MODELS = [name for name, model in PROJECT.models.items() if sources_of(model.source, PROJECT.downloads)]


def one_of(names):
    """Regular expression of these names and nothing else; names hold dots."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    experiment=one_of(ROWS),
    pretraining=one_of(PRETRAININGS),
    speed=one_of(SPEEDS),
    model=one_of(PROJECT.models),
    source=one_of(PROJECT.downloads),
    stage="pretrain|finetune",
    inference="full|pruned",


# Where jobs log to. Their shells read it from the environment: as a param, another store would run everything again, and
# as a resource, logs would show its password.
TRACKING = json.dumps({"uri": PROJECT.tracking.uri, "experiment": PROJECT.tracking.experiment})
TRACKING_VARIABLE = "DUALSPEED_TRACKING"
os.environ[TRACKING_VARIABLE] = TRACKING
# A download's folder is no output, for Snakemake would delete half of it; this says that it is whole.
RECEIPT = LAYOUT.receipt("{source}")
DATA_LOCK = Path(workflow.configfiles[0]).parent / "data.lock" if workflow.configfiles else Path("data.lock")

# Where a row's questions are divided, shards leave their answers in the state folder, and generate_answers merges them.
SHARDS = PROJECT.inference.shards
QUESTIONS_FOLDERS = {name: benchmark.folder for name, benchmark in PROJECT.benchmarks.items()}

CHECKPOINTS = [LAYOUT.model(row) for row in ROWS]
SCORES, ANSWERS = (
    [
        path(row.id, inference, benchmark)
        for row in PROJECT.rows
        for inference in row.inferences
        for benchmark in PROJECT.scored
    ]
    for path in (LAYOUT.score, LAYOUT.answer_file)
)
SUBMISSIONS = [LAYOUT.submission(row, name, SERVER_FILES[name]) for row in ROWS for name in PROJECT.submitted]

TABLES, FIGURES = LAYOUT.tables(PROJECT.sheet_name), LAYOUT.figures(PROJECT.sheet_name)
TIDY_FILES = expand(f"{TABLES}/{{name}}.csv", name=["scores", "scores_detail", "scores_by_type", "speed", "costs"])
TABLE_FILES = expand(
    f"{TABLES}/{{name}}.{{kind}}",
    name=["table1", "table2", "table3", "table_speed"],
    kind=["csv", "md", "tex"],
)
FIGURE_FILES = expand(
    f"{FIGURES}/{{name}}.{{kind}}",
    name=[
        *["figure4", "figure5"],
        *["figure_mismatch", "figure_speedup", "figure_question_types", "figure_learning_curves"],
    ],
    kind=["png", "svg"],
)
REPORT = LAYOUT.report(PROJECT.sheet_name)
# What makes this sheet again; the page says so.
OTHER_FILES = [path for path in map(os.path.relpath, workflow.configfiles) if path != "config/demo/config.yaml"]
COMMAND = shlex.join(
    ["snakemake"]
    + [word for path in OTHER_FILES for word in ("--configfile", path)]
    + ["--config", f"experiments={config['experiments']}"]
)


def settings_file(settings):
    """File that hands a job its settings; equal settings give the same path."""
    return str(jobs.write_settings(settings, LAYOUT.settings))


def base_model(model):
    """Folder of the checkpoint that a model's training starts from."""
    is_made = model in (*DEMO_MODELS, *ASSEMBLED_MODELS, *DOWNLOADED_MODELS)
    return LAYOUT.base_model(model) if is_made else PROJECT.models[model].source


def made_from(path):
    """Input of a job that reads `path`: the demo's data as a whole, a download's receipt, or the user's own file."""
    if Path(LAYOUT.demo_data) in Path(path).parents:
        return LAYOUT.demo_data
    return next((LAYOUT.receipt(name) for name in sources_of(path, PROJECT.downloads)), path)


def questions_of(benchmarks):
    """Inputs of jobs that read these benchmarks' files."""
    return sorted({made_from(QUESTIONS_FOLDERS[name]) for name in benchmarks})


def data_from(recipe):
    """Inputs that hold a recipe's rows: its annotations, or the files and folders among its sources."""
    if recipe.annotations:
        return made_from(recipe.annotations)
    return sorted({made_from(source.path) for source in recipe.data if source.path is not None})


def images_from(recipe):
    """Downloads that fill the folders of a recipe's images; none of a folder that is the user's own."""
    roots = {recipe.images, *(source.images for source in recipe.data)} - {"", None}
    return sorted({LAYOUT.receipt(name) for root in roots for name in sources_of(root, PROJECT.downloads)})


def validation_from(recipe):
    """Input that holds a recipe's held-out conversations; empty without a validation."""
    return [] if recipe.validation_annotations is None else [made_from(recipe.validation_annotations)]


def recipe_of(model, stage):
    """Recipe of a stage of a model's training."""
    return getattr(PROJECT.models[model].stages, stage)


def model_of_pretraining(wildcards):
    """Model that a pretraining trains."""
    return PRETRAININGS[wildcards.pretraining].model


def start_of_row(wildcards):
    """Checkpoint that a row's finetuning starts from: its pretraining, or a base model that is not pretrained here."""
    key = ROWS[wildcards.experiment].pretrain_key
    return LAYOUT.pretraining(key) if key else base_model(model_of_row(wildcards))


def model_of_row(wildcards):
    """Model that a row trains."""
    return ROWS[wildcards.experiment].model


def wanted(model, job):
    """Resources of a job of this kind (a field of ModelResources)."""
    return PROJECT.models[model].resources_of(job)


def scheduled(model_of, job):
    """These resources of a job whose model is `model_of` its wildcards; one that no model names is left to the profile."""
    named = {name for model in PROJECT.models for name in wanted(model, job).asked()}
    return {
        name: lambda wildcards, name=name: wanted(model_of(wildcards), job).asked().get(name) for name in sorted(named)
    }


def growing(minutes):
    """Runtime of a job that a retry starts anew: every attempt has as much more."""
    return lambda wildcards, attempt: attempt * minutes


def launch_options(model, stage):
    """Options of `dualspeed train` that change no result: its processes, and where they keep features."""
    recipe = recipe_of(model, stage)
    cache = f" --cache-features {shlex.quote(recipe.cache_features)}" if recipe.cache_features else ""
    return wanted(model, stage).launch_options(recipe.accelerate_config) + cache


def share_options(wildcards):
    """Options of `dualspeed speed` for the finetuning whose steps are timed."""
    model = SPEEDS[wildcards.speed].model
    return wanted(model, "finetune").share_options(recipe_of(model, "finetune").accelerate_config)


def parent_option(wildcards):
    """Option that names the run in MLflow that a row's job belongs to."""
    return f"--parent {shlex.quote(json.dumps(jobs.parent_run(ROWS[wildcards.experiment]), sort_keys=True))}"


def answer_settings(wildcards):
    """File of the settings of a row's answers."""
    row = ROWS[wildcards.experiment]
    return settings_file(jobs.answer_settings(PROJECT, row, wildcards.inference))


def all_answers(name, benchmarks):
    """A file of each benchmark beside a row's answers."""
    folder = LAYOUT.answers("{experiment}", "{inference}")
    return [f"{folder}/{name.format(benchmark=benchmark)}" for benchmark in benchmarks]


def shown(path):
    """Mark what the HTML report shows, with the caption of the same name."""
    name, kind = Path(path).stem, Path(path).suffix
    if kind not in (".csv", ".svg") or path in TIDY_FILES:
        return path
    category = "Figures" if kind == ".svg" else "Tables"
    return report(
        path,
        caption=f"../report/{name}.rst",
        category=category,
        labels={"sheet": PROJECT.sheet_name, "is": name},
    )

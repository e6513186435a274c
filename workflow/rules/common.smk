"""The checked configuration, the sheet's rows, and the paths that rules share; no rule is here."""

import json
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from dualspeed.cluster.gpus import NUM_GPUS
from dualspeed.errors import ConfigError
from dualspeed.settings import jobs
from dualspeed.settings.names import SERVER_FILES
from dualspeed.settings.project import load_project
from dualspeed.settings.sheet import read_sheet
from dualspeed.settings.sources import sources_of
from dualspeed.settings.stage import finetune_settings, pretrain_key, pretrain_settings

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
shell.prefix(
    f"export PATH='{Path(sys.executable).parent}':\"$PATH\" OMP_WAIT_POLICY=PASSIVE "
    f"MALLOC_MMAP_THRESHOLD_={2**30} MALLOC_TRIM_THRESHOLD_={2**33}; "
)

RESULTS = PROJECT.results
LOGS, TIMES = f"{RESULTS}/logs", f"{RESULTS}/job_times"
DEMO_DATA = f"{RESULTS}/data/demo"
STATE = f"{RESULTS}/state"

EXPERIMENTS = {experiment.id: experiment for experiment in PROJECT.experiments}
PRETRAININGS = {pretrain_key(PROJECT, experiment): experiment for experiment in PROJECT.experiments}
SPEEDS = {jobs.speed_key(PROJECT, one): one for one in PROJECT.experiments if jobs.speed_key(PROJECT, one)}
DEMO_MODELS = [name for name, model in PROJECT.models.items() if model.source == "demo"]
ASSEMBLED_MODELS = [name for name, model in PROJECT.models.items() if model.source == "parts"]
DOWNLOADED_MODELS = [name for name, model in PROJECT.models.items() if sources_of(model.source, PROJECT.downloads)]


def one_of(names):
    """Regular expression of these names and nothing else; names hold dots."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    experiment=one_of(EXPERIMENTS),
    pretraining=one_of(PRETRAININGS),
    speed=one_of(SPEEDS),
    model=one_of(PROJECT.models),
    source=one_of(PROJECT.downloads),
    stage="pretrain|finetune",
    inference="full|pruned",


# Where jobs log to. No params hold it, and what says that the store is there counts as old: another store reruns nothing.
TRACKING = json.dumps({"uri": PROJECT.tracking.uri, "experiment": PROJECT.tracking.experiment})
# A download's folder is no output, for Snakemake would delete half of it; this says that it is whole.
RECEIPT = f"{RESULTS}/downloads/{{source}}.json"
DATA_LOCK = Path(workflow.configfiles[0]).parent / "data.lock" if workflow.configfiles else Path("data.lock")

TRACKING_READY = f"{RESULTS}/state/tracking.ready"

CHECKPOINTS = expand(f"{RESULTS}/models/{{experiment}}", experiment=EXPERIMENTS)
SCORES = [
    f"{RESULTS}/scores/{one.id}/{inference}/{benchmark}.json"
    for one in PROJECT.experiments
    for inference in one.inferences
    for benchmark in PROJECT.scored
]
SUBMISSIONS = [
    f"{RESULTS}/submissions/{one.id}/{name}.{SERVER_FILES[name]}"
    for one in PROJECT.experiments
    for name in PROJECT.submitted
]


def as_json(settings):
    """Settings as they stand on a command line; equal settings give equal text."""
    return json.dumps(settings, sort_keys=True)


def base_model(model):
    """Folder of the checkpoint that a model's training starts from."""
    is_made = model in (*DEMO_MODELS, *ASSEMBLED_MODELS, *DOWNLOADED_MODELS)
    return f"{RESULTS}/models/base/{model}" if is_made else PROJECT.models[model].source


def made_from(path):
    """What a job that reads `path` waits for: the demo's data as a whole, a download, or a file of the user's own."""
    if Path(DEMO_DATA) in Path(path).parents:
        return DEMO_DATA
    return next((RECEIPT.format(source=name) for name in sources_of(path, PROJECT.downloads)), path)


def images_from(root):
    """The downloads that fill a root folder of images; none of a folder that is the user's own."""
    return [RECEIPT.format(source=name) for name in sources_of(root, PROJECT.downloads)]


def validation_from(recipe):
    """What makes a recipe's held-out conversations; nothing without a validation."""
    return [] if recipe.validation_annotations is None else [made_from(recipe.validation_annotations)]


def recipe_of(model, stage):
    """Recipe of a stage of a model's training."""
    return getattr(PROJECT.models[model].stages, stage)


def wanted(model, job):
    """What a job of this kind (a field of ModelResources) asks a scheduler for."""
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

"""Jobs that an edit runs again, by real dry runs: each line of the table at the end of config/README.md."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from dualspeed.cli import make_parser
from dualspeed.settings.jobs import read_settings
from dualspeed.settings.stage import StageSettings
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from tests.support.workflow import (
    BASELINE,
    KEPT,
    MILD,
    NAIVE,
    REPOSITORY,
    ROWS,
    STRONG,
    TABLES,
    Edit,
    copy_project,
    edit_cell,
    edit_code,
    edit_config,
    edit_rows,
    finetune_recipe,
    plan,
    snakemake,
    stub_outputs,
    touch_everything,
)


def pretrain_recipe(content: dict) -> dict:
    return content["models"]["tiny"]["stages"]["pretrain"]


def evaluate(*rows: str, inferences: tuple[str, ...] = ("full", "pruned")) -> set[str]:
    """Jobs that answer and score; MILD is not in Table 2 and answers on full tokens alone."""
    chosen = [(row, one) for row in rows for one in inferences if one == "full" or row != MILD]
    answers = {f"Answer the benchmarks with {row}, {one} tokens" for row, one in chosen}
    return answers | {f"Score {row}, {one} tokens" for row, one in chosen}


def finetune(*rows: str) -> set[str]:
    """Jobs that train, evaluate and show; the sheet's first row also shows what pruners keep."""
    return {f"Finetune {row}" for row in rows} | evaluate(*rows) | TABLES | (KEPT if BASELINE in rows else set())


PRETRAIN = {"Pretrain tiny-full-seed0-*", "Pretrain tiny-fast-seed0-*"}
PREPARE = {"Check and prepare the pretrain data of tiny", "Check and prepare the finetune data of tiny"}
TIME = {
    f"Time the steps of tiny-divprune-{name}-*, alone on this machine"
    for name in ("p0.9-l0-plain", "p0.75-l4-distilled", "p0.9-l4-distilled")
}
BASE = {"Make the base model tiny"}
DATA = {"Draw the demo's pictures and questions"}


def retrain_mild(speed: str | None, pretrain: str | None = "tiny-fast-seed0") -> set[str]:
    """Jobs of one row whose cell changed."""
    timing = {f"Time the steps of tiny-{speed}-*, alone on this machine"} if speed else set()
    return finetune(MILD) | timing | ({f"Pretrain {pretrain}-*"} if pretrain else set())


def add_row(rows: dict[str, dict]) -> None:
    rows["new"] = rows[STRONG] | {"id": "new", "slow_mode_ratio": "0.2", "tables": "figure5"}


def comment(project: Path) -> None:
    for name, mark in (("config.yaml", "\n# a comment\n"), ("experiments.tsv", "# a comment\n\n")):
        with (project / "config/demo" / name).open("a") as file:
            file.write(mark)


def copy_annotations(project: Path) -> None:
    """A recipe that reads another file, of the user's own."""
    (project / "mine.json").write_text("[]")
    edit_config(lambda content: finetune_recipe(content).update(annotations="mine.json"))(project)


def change_resources(content: dict) -> None:
    content["models"]["tiny"]["resources"] = {
        job: {"nodes": 2, "gpu": 4, "cpus": 8, "mem_mb": 1, "runtime": 1, "partition": "long", "account": "mine"}
        for job in ("pretrain", "finetune", "answer", "speed")
    }


def change_launcher(content: dict) -> None:
    for recipe in (pretrain_recipe(content), finetune_recipe(content)):
        recipe["accelerate_config"] = "config/accelerate/fsdp2.yaml"


def add_benchmark(content: dict) -> None:
    content["benchmarks"]["mme"] = {"folder": "results/data/demo/test/mme"}


def add_test_split(content: dict) -> None:
    content["benchmarks"]["vqav2_test"] = {"folder": "results/data/demo/test/vqav2"}


ANSWER = {job for job in evaluate(*ROWS) if job.startswith("Answer")}

# edit -> (how, jobs of the dry run)
EDITS: dict[str, tuple[Edit, set[str]]] = {
    "nothing": (lambda project: None, set()),
    "pruning_ratio": (edit_cell("pruning_ratio", "0.8"), retrain_mild("divprune-p0.8-l4-distilled")),
    "pruner": (edit_cell("pruner", "random"), retrain_mild("random-p0.75-l4-distilled")),
    "num_virtual_tokens": (edit_cell("num_virtual_tokens", "8"), retrain_mild("divprune-p0.75-l8-distilled")),
    "seed": (edit_cell("seed", "5"), retrain_mild(None, "tiny-fast-seed5")),
    "slow_mode_ratio": (edit_cell("slow_mode_ratio", "0.2"), retrain_mild(None, None)),
    "slow_steps": (edit_cell("slow_steps", "2"), retrain_mild(None, None)),
    "max_steps": (edit_cell("max_steps", "5"), retrain_mild(None, None)),
    "distillation_weight": (edit_cell("distillation_weight", "0.5"), retrain_mild(None, None)),
    "no distillation": (edit_cell("distillation_weight", "0"), retrain_mild("divprune-p0.75-l4-plain", None)),
    "tables": (edit_cell("tables", "figure4"), TABLES),
    "new in table2": (
        edit_cell("tables", "table2"),
        TABLES | {f"Answer the benchmarks with {MILD}, pruned tokens", f"Score {MILD}, pruned tokens"},
    ),
    "new row": (
        edit_rows(add_row),
        {"Finetune new"} | evaluate("new", inferences=("full",)) | TABLES,
    ),
    "removed row": (edit_rows(lambda rows: rows.pop(MILD)), TABLES),
    "finetuning learning rate": (
        edit_config(lambda content: finetune_recipe(content)["training_arguments"].update(learning_rate=5.0e-4)),
        finetune(*ROWS),
    ),
    "pretraining learning rate": (
        edit_config(lambda content: pretrain_recipe(content)["training_arguments"].update(learning_rate=5.0e-4)),
        finetune(*ROWS) | PRETRAIN,
    ),
    "no pretraining": (
        edit_config(lambda content: content["models"]["tiny"]["stages"].pop("pretrain")),
        finetune(*ROWS),
    ),
    "pretraining template": (
        edit_config(lambda content: pretrain_recipe(content).update(chat_template="turns")),
        finetune(*ROWS) | PRETRAIN | {"Check and prepare the pretrain data of tiny"},
    ),
    "finetuning template": (
        edit_config(lambda content: finetune_recipe(content).update(chat_template="vicuna_v1")),
        finetune(*ROWS) | TIME | {"Check and prepare the finetune data of tiny"},
    ),
    "finetuning annotations": (
        copy_annotations,
        finetune(*ROWS) | TIME | {"Check and prepare the finetune data of tiny"},
    ),
    "finetuning validation": (
        edit_config(
            lambda content: finetune_recipe(content).update(validation_annotations=None, validation_steps=None)
        ),
        finetune(*ROWS) | TIME | {"Check and prepare the finetune data of tiny"},
    ),
    "finetuning validation steps": (
        edit_config(lambda content: finetune_recipe(content).update(validation_steps=50)),
        finetune(*ROWS),
    ),
    "pretraining length": (
        edit_config(lambda content: pretrain_recipe(content).update(max_length=256)),
        finetune(*ROWS) | PRETRAIN | {"Check and prepare the pretrain data of tiny"},
    ),
    "resources": (edit_config(change_resources), set()),
    "accelerate_config": (edit_config(change_launcher), set()),
    "cache_features": (edit_config(lambda content: finetune_recipe(content).update(cache_features="kept")), set()),
    "new benchmark": (edit_config(add_benchmark), evaluate(*ROWS) | TABLES),
    "new test split": (
        edit_config(add_test_split),
        {f"Write what the server of vqav2_test takes from {row}" for row in ROWS}
        | evaluate(*ROWS, inferences=("full",))
        | TABLES,
    ),
    "inference": (
        edit_config(lambda content: content["inference"].update(max_new_tokens=4)),
        evaluate(*ROWS) | TABLES,
    ),
    "shards": (
        edit_config(lambda content: content["inference"].update(shards=2)),
        {f"Answer part {part} of 2 with{job.partition('with')[2]}" for part in (1, 2) for job in ANSWER}
        | evaluate(*ROWS)
        | TABLES,
    ),
    "data": (
        edit_config(lambda content: content["data"].update(seed=7)),
        finetune(*ROWS) | TIME | PRETRAIN | PREPARE | BASE | DATA,
    ),
    "base_model": (
        edit_config(lambda content: content["base_model"].update(seed=7)),
        finetune(*ROWS) | TIME | PRETRAIN | PREPARE | BASE,
    ),
    "plan": (edit_config(lambda content: content.update(plan={"gpu": "h100"})), set()),
    "tracking": (
        edit_config(lambda content: content["tracking"].update(uri="sqlite:///elsewhere.db")),
        {"Make sure of the MLflow store"},
    ),
    "touched files": (touch_everything, set()),
    "comment": (comment, set()),
    "code": (edit_code, set()),
}

# Line of the table in config/README.md -> edits that show it; the last ones have tests of their own.
LINES = {
    "a row's `pruner` or `pruning_ratio`": ("pruner", "pruning_ratio"),
    "a row's `num_virtual_tokens`": ("num_virtual_tokens",),
    "a row's `seed`": ("seed",),
    "a row's `slow_mode_ratio`, `slow_steps`, `max_steps` or `distillation_weight`": (
        "slow_mode_ratio",
        "slow_steps",
        "max_steps",
        "distillation_weight",
        "no distillation",
    ),
    "a row's `tables`": ("tables", "new in table2"),
    "a new row": ("new row",),
    "a removed row": ("removed row",),
    "`stages.finetune.training_arguments`": ("finetuning learning rate",),
    "`stages.pretrain.training_arguments`": ("pretraining learning rate",),
    "a stage `pretrain`, added or removed": ("no pretraining",),
    # tests/workflow/test_data_sources.py has the sources
    "a stage's `annotations`, `chat_template` or `max_length`, or a source, share or limit of its `data`": (
        "finetuning annotations",
        "pretraining template",
        "finetuning template",
        "pretraining length",
    ),
    "a stage's `validation_annotations`": ("finetuning validation",),
    "a stage's `validation_steps`": ("finetuning validation steps",),
    "a new benchmark": ("new benchmark", "new test split"),
    "`inference.*`": ("inference", "shards"),
    "`data.*` (the demo's, at the top)": ("data",),
    "`base_model.*`": ("base_model",),
    "`accelerate_config`": ("accelerate_config",),
    "`cache_features`": ("cache_features",),
    "`models.<model>.resources`": ("resources",),
    "`plan.*`": ("plan",),
    "`tracking.*`": ("tracking",),
    "a file touched, its content unchanged": ("touched files",),
    "a comment or blank line in either file": ("comment",),
    "code or package versions": ("code",),
    "a model's `parts`": (),
    "`downloads.<source>`": (),
    "`snakemake --config experiments=...` and back": (),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project in which Snakemake takes every job for done."""
    project = copy_project(tmp_path_factory.mktemp("finished"))
    edit_config(lambda content: content["benchmarks"].pop("mme"))(project)
    edit_cell("tables", "table1")(project)
    stub_outputs(project)
    return project


@pytest.fixture(scope="module")
def plans(finished, tmp_path_factory) -> dict[str, set[str]]:
    """Each edit's dry run, two at a time."""
    root = tmp_path_factory.mktemp("edited")

    def plan_edit(name: str) -> set[str]:
        project = shutil.copytree(finished, root / name)
        EDITS[name][0](project)
        return plan(project)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(EDITS, pool.map(plan_edit, EDITS), strict=True))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_runs_again_what_depends_on_it(plans, edit):
    assert plans[edit] == EDITS[edit][1]


def test_every_line_of_the_readme_is_an_edit_here():
    table = (REPOSITORY / "config/README.md").read_text().partition("| edit | runs again |\n|---|---|\n")[2]
    lines = [line.split(" | ")[0].removeprefix("| ") for line in table.split("\n\n")[0].strip().splitlines()]
    assert sorted(lines) == sorted(LINES)
    assert sorted(edit for edits in LINES.values() for edit in edits) == sorted(set(EDITS) - {"nothing"})


@pytest.fixture
def later_package(tmp_path) -> Path:
    """A folder with the package of a later version, whose recipes and methods have one more optional setting."""
    folder = tmp_path / "later"
    shutil.copytree(REPOSITORY / "dualspeed", folder / "dualspeed", ignore=shutil.ignore_patterns("__pycache__"))
    for module, cls in (("recipe", "Recipe(DataRecipe)"), ("recipe", "DataRecipe"), ("method", "DualSpeedConfig")):
        file = folder / f"dualspeed/settings/{module}.py"
        text = file.read_text()
        body = text.index('"""\n', text.index(f"class {cls}:")) + 4
        body = text.index("\n\n", body) + 1 if text[body] == "\n" else body
        field = f"    brand_new_in_{cls[:4].lower()}: int = 3\n"
        file.write_text(text[:body] + "\n" * (text[body] != "\n") + field + text[body:])
    return folder


def test_a_new_optional_setting_runs_nothing_again(finished, later_package, tmp_path):
    project = shutil.copytree(finished, tmp_path / "project")
    assert plan(project, package=later_package) == set()
    command, environment = [sys.executable, "-m", "dualspeed.settings.schema"], {"PYTHONPATH": str(later_package)}
    subprocess.run(command, cwd=project, env=os.environ | environment, check=True)
    edit_config(lambda content: finetune_recipe(content).update(brand_new_in_reci=4))(project)
    assert plan(project, package=later_package) == finetune(*ROWS) | TIME


def test_a_change_of_profile_runs_nothing_again():
    profiles = [yaml.safe_load(file.read_text()) for file in sorted(REPOSITORY.glob("profiles/*/config.yaml"))]
    assert len(profiles) == 3
    for key in ("rerun-triggers", "max-checksum-file-size", "rerun-incomplete"):
        assert len({str(profile[key]) for profile in profiles}) == 1
    assert profiles[0]["rerun-triggers"] == ["mtime", "input", "params"]  # neither code nor software-env


def test_another_sheet_over_the_same_results_trains_nothing_again(finished, tmp_path):
    project = shutil.copytree(finished, tmp_path / "project")
    edit_rows(lambda rows: rows.pop(NAIVE), sheet="experiments-two")(project)
    other = plan(project, "--config", "experiments=config/demo/experiments-two.tsv")
    assert other == {
        "Write tables and figures of the sheet demo-two",
        *KEPT,
        "Write the page that shows the sheet demo-two: results/report-two.html",
    }
    assert plan(project) == set()


def test_other_parts_make_the_base_model_and_all_that_starts_from_it(finished, tmp_path):
    project = shutil.copytree(finished, tmp_path / "project")
    for folder in ("vicuna", "llama", "clip"):
        (project / folder).mkdir()
    parts = {"family": "llava", "language_model": "vicuna", "vision_tower": "clip"}

    def change(content: dict) -> None:
        content["models"]["tiny"] |= {"source": "parts", "parts": parts}

    edit_config(change)(project)
    snakemake(project, "--touch", "--forceall")
    assert plan(project) == set()
    parts["language_model"] = "llama"
    edit_config(change)(project)
    assert plan(project) == finetune(*ROWS) | TIME | PRETRAIN | PREPARE | {"Put the base model tiny together"}


def test_a_configuration_of_ones_own_replaces_the_demo(finished, tmp_path):
    project = shutil.copytree(finished, tmp_path / "project")
    content = yaml.safe_load((project / "config/demo/config.yaml").read_text().replace("results/", "mine/"))
    content |= {"name": "mine", "experiments": "config/demo/mine.tsv", "results": "mine"}
    content["models"] = {"other": content["models"]["tiny"]}
    edit_rows(lambda rows: [row.update(model="other") for row in rows.values()], sheet="mine")(project)
    (project / "mine.yaml").write_text(yaml.safe_dump(content))
    jobs = plan(project, "--configfile", "mine.yaml")
    assert "Make the base model other" in jobs
    assert "Write the page that shows the sheet mine-mine: mine/report-mine-mine.html" in jobs
    assert not [job for job in jobs if "tiny" in job]


def test_a_wrong_cell_is_one_error_that_names_it(finished, tmp_path):
    project = shutil.copytree(finished, tmp_path / "project")
    edit_cell("pruning_ratio", "1.5")(project)
    output = snakemake(project, "-n")
    message = f"config/demo/experiments.tsv: row {MILD}: pruning_ratio: 1.5 is out of range; valid: in [0, 1)"
    assert output.count(message) == 1
    assert "Traceback" not in output


def test_a_configuration_that_is_no_yaml_is_one_error_that_names_file_and_line(finished, tmp_path):
    project = shutil.copytree(finished, tmp_path / "project")
    (project / "config/demo/config.yaml").write_text("name: x\ntracking: [\n")
    output = snakemake(project, "-n")
    assert "config/demo/config.yaml, line 3: not valid YAML" in output
    assert "Traceback" not in output


def test_the_schema_refuses_an_unknown_key(finished):
    from jsonschema import ValidationError
    from snakemake.utils import validate

    content = yaml.safe_load((finished / "config/demo/config.yaml").read_text())
    schema = str(REPOSITORY / "workflow/schemas/config.schema.yaml")
    validate(content, schema)
    with pytest.raises(Exception, match="inferense") as raised:
        validate(content | {"inferense": {}}, schema)
    assert isinstance(raised.value, ValidationError) or "validat" in str(raised.value)


def test_every_command_of_the_workflow_is_one_that_dualspeed_takes(finished):
    output = snakemake(finished, "-n", "--forceall", "--printshellcmds")
    lines = re.findall(r"dualspeed ([a-z-]+ (?:init )?--.*) >", output)
    store = shlex.quote('{"uri": "sqlite:///x.db", "experiment": "x"}')
    commands = [make_parser().parse_args(shlex.split(line.replace('"$DUALSPEED_TRACKING"', store))) for line in lines]
    training = {"demo-data", "base-model", "prepare", "train", "answer", "speed", "track"}
    expected = training | {"tables", "kept-tokens", "report"}
    assert {options.command for options in commands} == expected
    for options in commands:
        if options.command == "train":
            settings = read_settings(StageSettings, finished / options.settings)
            assert (settings.stage == "finetune") == (options.parent is not None)


def test_track_sync_delivers_what_jobs_could_not(finished, tmp_path):
    project = shutil.copytree(finished, tmp_path / "project")
    with MetricLog(project / "results/state/one", None, RunSpec("finetune")) as log:
        log.log(1, {"loss": 1.0, "ce_loss": 0.5})
    output = snakemake(project, "track_sync")
    assert "2 metrics were missing; they are at sqlite:///results/mlflow.db now." in output, output[-3000:]
    command = [sys.executable, "-m", "dualspeed.cli", "track", "sync", "--configfile", "config/demo/config.yaml"]
    again = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert again.stdout.startswith("0 metrics were missing"), again.stderr

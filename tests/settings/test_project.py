"""Settings: what is read, what is refused with which words, and which rows share what."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from dualspeed.benchmarks import BENCHMARKS, SERVER_BENCHMARKS
from dualspeed.chat_templates import AUTO, TEMPLATE_NAMES
from dualspeed.errors import ConfigError
from dualspeed.pruners import PRUNERS
from dualspeed.settings import jobs
from dualspeed.settings.identity import identity
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.names import BENCHMARK_NAMES, PRUNER_NAMES, SERVER_FILES
from dualspeed.settings.project import Project, load_project
from dualspeed.settings.recipe import DataRecipe, Recipe, batch_plan
from dualspeed.settings.schema import config_schema, row_schema, schema_files
from dualspeed.settings.sheet import Row
from dualspeed.settings.sheet_file import COLUMNS
from dualspeed.settings.stage import StageSettings
from tests.support.paths import REPOSITORY
from tests.support.projects import CONFIG, DEMO, load, write_sheet

DEMO_FULL = REPOSITORY / "config/demo/experiments-full.tsv"
MODEL = "models.tiny.stages.finetune"
ARGUMENTS = f"{MODEL}.training_arguments"


def row_of(project: Project, identifier: str) -> Row:
    return next(row for row in project.rows if row.id == identifier)


def read_row(folder: Path, row: str) -> Row:
    return load(write_sheet(folder, f"id=x model=tiny {row}")).rows[0]


@pytest.mark.parametrize("sheet", ["demo", "paper"])
def test_the_sheets_of_the_repository_are_valid(sheet):
    for file in (REPOSITORY / "config" / sheet).glob("experiments*.tsv"):
        config = yaml.safe_load((REPOSITORY / "config" / sheet / "config.yaml").read_text())
        assert load_project(config | {"experiments": str(file)}).rows


def test_every_demo_row_is_the_same_in_the_full_sheet_and_asks_for_the_same_work():
    demo, full = load(DEMO), load(DEMO_FULL)
    assert (demo.sheet.name, full.sheet.name) == ("demo", "demo-full")
    for row in demo.rows:
        same = row_of(full, row.id)
        assert demo.finetune_settings(row) == full.finetune_settings(same)
        assert row.pretrain_key == same.pretrain_key
        assert row.inferences == same.inferences


def test_the_methods_are_settings(tmp_path):
    assert read_row(tmp_path, "method=dualspeed").dualspeed == DualSpeedConfig()
    baseline = read_row(tmp_path, "method=baseline").dualspeed
    assert (baseline.slow_mode_ratio, baseline.num_virtual_tokens, baseline.distillation_weight) == (1, 0, 0)
    naive = read_row(tmp_path, "method=naive_prune pruner=random pruning_ratio=0.5").dualspeed
    assert (naive.slow_mode_ratio, naive.num_virtual_tokens, naive.distillation_weight) == (0, 0, 0)
    assert (naive.pruner, naive.pruning_ratio) == ("random", 0.5)


def test_pretraining_is_shared_by_rows_that_ask_for_the_same(tmp_path):
    rows = {
        "paper": "method=dualspeed",
        "r": "method=dualspeed slow_mode_ratio=0.2",
        "alpha": "method=dualspeed distillation_weight=0",
        "l": "method=dualspeed num_virtual_tokens=8",
        "p": "method=dualspeed pruning_ratio=0.5",
        "pruner": "method=dualspeed pruner=random",
        "seed": "method=dualspeed seed=1",
        "plain": "method=dualspeed num_virtual_tokens=0",
        "naive": "method=naive_prune",
        "baseline": "method=baseline",
        "slow": "method=dualspeed slow_mode_ratio=1 num_virtual_tokens=0",
        "slow_random": "method=dualspeed slow_mode_ratio=1 num_virtual_tokens=0 pruner=random pruning_ratio=0.5",
    }
    project = load(write_sheet(tmp_path, *(f"id={name} model=tiny {row}" for name, row in rows.items())))
    keys = {row.id: row.pretrain_key for row in project.rows}
    shared = [{"paper", "r", "alpha"}, {"plain", "naive"}, {"baseline", "slow", "slow_random"}]
    alone = [{"l"}, {"p"}, {"pruner"}, {"seed"}]
    groups = {frozenset(name for name in keys if keys[name] == key) for key in keys.values()}
    assert groups == {frozenset(group) for group in shared + alone}
    assert keys["paper"].startswith("tiny-fast-seed0-") and keys["baseline"].startswith("tiny-full-seed0-")
    speeds = {row.id: row.speed_key for row in project.rows}
    assert speeds["paper"] == speeds["r"] == speeds["seed"] != speeds["alpha"]
    assert speeds["baseline"] is None


def test_pixels_are_pruned_in_the_rows_of_their_model_that_prune(tmp_path):
    sheet = write_sheet(
        tmp_path,
        "id=fast model=tiny method=dualspeed",
        "id=naive model=tiny method=naive_prune",
        "id=baseline model=tiny method=baseline",
        "id=slow model=tiny method=dualspeed slow_mode_ratio=1 num_virtual_tokens=0",
    )
    without, pruned = (
        load(sheet, models__tiny__source=str(tmp_path), models__tiny__pixel_pruning=tolerance)
        for tolerance in (None, 0)
    )
    assert {row.id: row.dualspeed.pixel_pruning for row in pruned.rows} == {
        "fast": 0, "naive": 0, "baseline": None, "slow": 0
    }  # fmt: skip
    trained_anew = {row.id for row in pruned.rows if row.settings_hash != row_of(without, row.id).settings_hash}
    assert trained_anew == {"fast", "naive", "slow"}
    pretrained_anew = {row.id for row in pruned.rows if row.pretrain_key != row_of(without, row.id).pretrain_key}
    assert pretrained_anew == {"fast", "naive"}


def test_finetuning_and_its_learning_rate_leave_the_pretraining_alone():
    changed = load(models__tiny__stages__finetune__training_arguments={"learning_rate": 5.0e-4})
    for row in load().rows:
        same = row_of(changed, row.id)
        assert row.pretrain_key == same.pretrain_key
        assert row.settings_hash != same.settings_hash
        assert load().finetune_settings(row) != changed.finetune_settings(same)


def test_settings_survive_their_files(tmp_path):
    project = load(DEMO_FULL)
    stages = [
        settings
        for row in project.rows
        for settings in (project.pretrain_settings(row), project.finetune_settings(row))
    ]
    others = [
        project.sheet,
        project.data,
        project.base_model,
        *(project.speed_settings(row) for row in project.rows),
        *(jobs.answer_settings(project, row, inference) for row in project.rows for inference in row.inferences),
        jobs.kept_tokens_settings(project),
        jobs.report_settings(project, "snakemake"),
    ]
    for settings in (*stages, *others):
        path = jobs.write_settings(settings, tmp_path)
        assert jobs.read_settings(type(settings), path) == settings
        assert jobs.write_settings(settings, tmp_path) == path
    assert len({jobs.write_settings(settings, tmp_path) for settings in stages}) == len(set(map(repr, stages)))


def test_a_file_of_other_settings_is_one_clear_error(tmp_path):
    path = jobs.write_settings(load().data, tmp_path)
    with pytest.raises(ConfigError, match="kind 'SceneSettings'; valid: a file of StageSettings"):
        jobs.read_settings(StageSettings, path)
    path.write_text("{")
    with pytest.raises(ConfigError, match=f"{path}: not valid JSON"):
        jobs.read_settings(StageSettings, path)
    with pytest.raises(ConfigError, match="No such file"):
        jobs.read_settings(StageSettings, tmp_path / "missing.json")


def test_preparation_depends_on_the_data_alone():
    recipe = load().models["tiny"].stages.finetune
    assert recipe.preparation() == dataclasses.replace(recipe, training_arguments={}).preparation()
    assert dataclasses.replace(recipe, max_length=64).preparation() != recipe.preparation()
    assert type(recipe.preparation()) is DataRecipe


def test_pruned_inference_uses_the_rows_own_pruner_or_the_configured_one(tmp_path):
    rows = ("id=a model=tiny method=baseline", "id=b model=tiny method=dualspeed pruner=random pruning_ratio=0.5")
    project = load(write_sheet(tmp_path, *rows), inference={"pruner": "fastervlm", "pruning_ratio": 0.75})
    chosen = [jobs.answer_settings(project, row, "pruned") for row in project.rows]
    assert [(one.pruner, one.pruning_ratio) for one in chosen] == [("fastervlm", 0.75), ("random", 0.5)]
    assert "pruner" not in identity(jobs.answer_settings(project, project.rows[1], "full"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"inferense": {}}, "config.yaml: inferense: unknown key (did you mean 'inference'?); valid: name, "),
        ({"name": 3}, "config.yaml: name: 3 is of type int; valid: str"),
        ({"name": "a/b"}, "config.yaml: name: 'a/b' cannot name a folder"),
        ({"tracking": {"uri": "x"}}, "config.yaml: tracking.experiment: missing; valid: str"),
        (
            {"tracking": {"uri": "postgresql://me@host/mlflow", "experiment": "x"}},
            "config.yaml: tracking.uri: 'postgresql' can't be used; valid: sqlite:///<path>, http(s)://<host>:<port>",
        ),
        ({"tracking": "x"}, "config.yaml: tracking: 'x' is of type str; valid: a mapping of keys"),
        ({"tracking": None}, "config.yaml: tracking: None is empty; valid: a mapping of keys"),
        ({"benchmarks": {"pop": {"folder": "x"}}}, "benchmarks: 'pop' is unknown (did you mean 'pope'?); valid: gqa"),
        ({"benchmarks": {}}, "config.yaml: benchmarks: empty; valid: some of gqa"),
        ({"benchmarks__gqa": {"dir": "x"}}, "config.yaml: benchmarks.gqa.dir: unknown key; valid: folder"),
        ({"inference__pruner": "divprun"}, "inference.pruner: 'divprun' is unknown (did you mean 'divprune'?)"),
        ({"inference__pruning_ratio": 1}, "inference.pruning_ratio: 1.0 is out of range; valid: in [0, 1)"),
        ({"inference__batch_size": True}, "inference.batch_size: True is of type bool; valid: int"),
        ({"inference__batch_size": 2.0}, "inference.batch_size: 2.0 is of type float; valid: int"),
        ({"data__source": "web"}, "config.yaml: data.source: 'web' is unknown; valid: demo"),
        ({"data__num_train_scenes": 0}, "config.yaml: data.num_train_scenes: 0"),
        ({"data__num_scenes": 5}, "config.yaml: data.num_scenes: unknown key"),
        ({"base_model__text_width": "96"}, "config.yaml: base_model.text_width: '96' is of type str; valid: int"),
        ({"models__tiny__source": "no/such"}, "config.yaml: models.tiny.source: 'no/such' does not exist; valid: what"),
        ({"models__tiny__source": "parts"}, "config.yaml: models.tiny.parts: with source 'parts'; valid: with source"),
        (
            {"models__tiny__parts": {"family": "x"}},
            "config.yaml: models.tiny.parts.language_model: missing; valid: str",
        ),
        ({"models__tiny__prune_budget": "all"}, "models.tiny.prune_budget: 'all' is unknown; valid: image, tile"),
        ({"models__tiny__pixel_pruning": -1}, "pixel_pruning: -1.0 is out of range; valid: 0 or more, or null"),
        (
            {"models__tiny__pixel_pruning": 0},
            "models.tiny.pixel_pruning: 0 with source 'demo', a LLaVA, whose tower takes whole images; valid: null, or",
        ),
        ({"models__tiny__stages__tune": {}}, "models.tiny.stages.tune: unknown key"),
    ],
)
def test_a_wrong_key_of_the_configuration_is_one_clear_error(changes, message):
    with pytest.raises(ConfigError) as raised:
        load(**changes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "chat_template",
            "vicuna",
            f"{MODEL}.chat_template: 'vicuna' is unknown (did you mean 'vicuna_v1'?); valid: auto, plain",
        ),
        ("image_aspect_ratio", "crop", f"{MODEL}.image_aspect_ratio: 'crop' is unknown; valid: anyres, pad, square"),
        ("accelerate_config", "no/such.yaml", f"{MODEL}.accelerate_config: 'no/such.yaml' does not exist; valid: what"),
        ("max_length", 0, f"{MODEL}.max_length: 0 is out of range; valid: above 0"),
        ("global_batch_size", 0, f"{MODEL}.global_batch_size: 0 is out of range"),
        ("per_device_batch_size", 5, "is out of range; valid: a multiple of 1 devices x 5 samples"),
        ("projector_learning_rate", "2e-5", "(YAML reads 2e-5 as a string; write 2.0e-05)"),
        ("projector_learning_rate", -1.0, f"{MODEL}.projector_learning_rate: -1.0 is out of range"),
        (
            "training_arguments",
            {"learning_rate": "2e-5"},
            f"{ARGUMENTS}.learning_rate: '2e-5' is of type str; valid: float",
        ),
        (
            "training_arguments",
            {"learning_rat": 1.0},
            f"{ARGUMENTS}.learning_rat: unknown key (did you mean 'learning_rate'?)",
        ),
        ("training_arguments", {"max_steps": 1e3}, f"{ARGUMENTS}.max_steps: 1000.0 is of type float; valid: int"),
        ("training_arguments", {"bf16": 1}, f"{ARGUMENTS}.bf16: 1 is of type int; valid: bool"),
        ("training_arguments", {"lr_scheduler_type": "cosin"}, "'cosin' is unknown (did you mean 'cosine'?)"),
        ("training_arguments", {"weight_decay": -0.1}, f"{ARGUMENTS}.weight_decay: -0.1 is out of range"),
        ("training_arguments", {"adam_beta2": 1.0}, f"{ARGUMENTS}.adam_beta2: 1.0 is out of range; valid: in [0, 1)"),
        ("training_arguments", {"seed": 1}, f"{ARGUMENTS}.seed: not set here; valid: column seed"),
        ("training_arguments", {"gradient_accumulation_steps": 2}, "not set here; valid: global_batch_size"),
        ("training_arguments", {"per_device_train_batch_size": 2}, "not set here; valid: global_batch_size"),
    ],
)
def test_a_wrong_recipe_is_one_clear_error(key, value, message):
    with pytest.raises(ConfigError) as raised:
        load(**{f"models__tiny__stages__finetune__{key}": value})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ("pruning_ratio=1", "row x: pruning_ratio: 1.0 is out of range; valid: in [0, 1)"),
        ("pruning_ratio=-0.1", "row x: pruning_ratio: -0.1 is out of range"),
        ("pruning_ratio=nan", "row x: pruning_ratio: nan is out of range; valid: in [0, 1)"),
        ("pruning_ratio=o.9", "row x: pruning_ratio: 'o.9' is no float; valid: float, or empty"),
        ("num_virtual_tokens=4.0", "row x: num_virtual_tokens: '4.0' is no int"),
        (
            "pruner=fastvlm",
            "row x: pruner: 'fastvlm' is unknown (did you mean 'fastervlm'?); valid: cdpruner, cdpruner_cen, divprune",
        ),
        ("slow_mode_ratio=2", "row x: slow_mode_ratio: 2.0 is out of range; valid: in [0, 1]"),
        ("seed=-1", "row x: seed: -1 is out of range; valid: 0 or more"),
        ("tables=table1,table9", "row x: tables: 'table9' is unknown"),
        ("pruning_rate=0.5", "column 'pruning_rate' is unknown (did you mean 'pruning_ratio'?); valid: id, model"),
        ("method=dualsped", "row x: method: 'dualsped' is unknown (did you mean 'dualspeed'?)"),
        ("model=huge", "row x: model: 'huge' is unknown; valid: tiny"),
        ("id=a/b", "row a/b: id: 'a/b' cannot name a folder"),
        ("id=base", "row base: id: 'base' is taken"),
        ("method=baseline pruner=random", "row x: pruner: 'random' in a row of method baseline, which does not prune"),
        (
            "method=baseline slow_mode_ratio=0.5",
            "row x: slow_mode_ratio: 0.5 contradicts the method baseline; valid: 1",
        ),
        (
            "method=naive_prune num_virtual_tokens=4",
            "num_virtual_tokens: 4 contradicts the method naive_prune; valid: 0",
        ),
    ],
)
def test_a_wrong_cell_is_one_clear_error(tmp_path, row, message):
    cells = "id=x model=tiny method=dualspeed"
    words = {word.split("=")[0]: word for word in f"{cells} {row}".split()}
    sheet = write_sheet(tmp_path, " ".join(words.values()))
    with pytest.raises(ConfigError) as raised:
        load(sheet)
    assert str(raised.value).startswith(f"{sheet}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "column 'id' is missing"),
        ("id\tmodel\tmethod\n", "no row; valid: one row per trained model"),
        ("id,model,method\nx,tiny,baseline\n", "column 'id,model,method' is unknown"),
        ("id\tmodel\tmethod\n\ttiny\tbaseline\n", "id: empty; valid: a value in every row"),
        ("id\tmodel\tmethod\nx\ttiny\tbaseline\nx\ttiny\tbaseline\n", "row x: id: used by an earlier row"),
        ("id\tmodel\tmethod\nx\ttiny\tbaseline\t\t\n", "row x: 5 cells; valid: 3, one per column"),
        ("id\tid\tmodel\tmethod\n", "column 'id' is there twice"),
    ],
)
def test_a_broken_sheet_is_one_clear_error(tmp_path, text, message):
    sheet = tmp_path / "experiments.tsv"
    sheet.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(sheet)
    assert str(raised.value).startswith(f"{sheet}: ")
    assert message in str(raised.value)


def test_a_missing_sheet_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no such file; valid: a tab-separated sheet"):
        load(tmp_path / "experiments.tsv")


def test_a_sheet_that_is_no_text_is_one_clear_error(tmp_path):
    sheet = tmp_path / "experiments.tsv"
    sheet.write_bytes(b"id\tmodel\xff\n")
    with pytest.raises(ConfigError, match="not readable as text"):
        load(sheet)


def test_accumulation_follows_from_the_global_batch():
    assert batch_plan(128, num_processes=8, per_device_batch_size=4) == 4
    assert batch_plan(32, num_processes=1, per_device_batch_size=32) == 1
    for processes, per_device in ((3, 4), (8, 32), (1, 0)):
        with pytest.raises(ConfigError, match="global_batch_size: 128 is out of range; valid: a multiple of"):
            batch_plan(128, processes, per_device)


def test_the_names_known_without_torch_are_those_of_the_registries():
    assert set(PRUNER_NAMES) == set(PRUNERS)
    assert set(BENCHMARK_NAMES) == set(BENCHMARKS)
    assert set(SERVER_FILES) == set(SERVER_BENCHMARKS)


def test_the_schemas_are_those_that_the_dataclasses_give():
    for name, text in schema_files().items():
        assert (REPOSITORY / "workflow/schemas" / name).read_text() == text, "python -m dualspeed.settings.schema"


def test_the_schemas_know_the_keys_of_the_configuration_and_the_sheet():
    schema = config_schema()
    derived = {"rows", "sheet_name"}
    own = {field.name for field in dataclasses.fields(Project)} - derived
    assert set(schema["properties"]) == own | {"experiments"}
    assert set(schema["properties"]["benchmarks"]["propertyNames"]["enum"]) == {*BENCHMARK_NAMES, *SERVER_FILES}
    recipe = schema["$defs"]["Recipe"]["properties"]
    assert set(recipe) == {field.name for field in dataclasses.fields(Recipe)}
    assert recipe["max_dropped_share"]["maximum"] == 1 and recipe["chat_template"]["enum"] == [AUTO, *TEMPLATE_NAMES]
    assert list(row_schema()["properties"]) == list(COLUMNS)
    assert row_schema()["properties"]["pruning_ratio"]["exclusiveMaximum"] == 1


@pytest.mark.parametrize(
    "key, value",
    [
        ("inference__pruning_ratio", 1),
        ("inference__pruner", "divprun"),
        ("models__tiny__stages__finetune__max_length", 0),
        ("models__tiny__stages__finetune__lora", {"rank": 0}),
        ("models__tiny__resources", {"finetune": {"gpu": -1}}),
        ("plan", {"gpu": "abacus"}),
    ],
)
def test_schema_and_dataclass_refuse_the_same_values(key, value):
    validator = Draft202012Validator(config_schema())
    content = json.loads(json.dumps(CONFIG)) | {"experiments": str(DEMO)}
    assert not list(validator.iter_errors(content))
    *parents, last = key.split("__")
    block = content
    for parent in parents:
        block = block[parent]
    block[last] = value
    assert list(validator.iter_errors(content))
    with pytest.raises(ConfigError):
        load_project(content, "config.yaml")


def test_a_configuration_that_is_no_yaml_names_file_and_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("name: x\ntracking: [\n")
    with pytest.raises(ConfigError, match=rf"{file}, line 3: not valid YAML"):
        load_project(file)
    with pytest.raises(ConfigError, match=r"missing.yaml: No such file"):
        load_project(tmp_path / "missing.yaml")


def test_the_readme_of_the_configuration_names_every_key_and_column():
    text = (REPOSITORY / "config/README.md").read_text()
    for key in [*COLUMNS, *(field.name for field in dataclasses.fields(Recipe))]:
        assert f"`{key}`" in text, key


def test_the_configuration_and_the_command_line_load_no_heavy_library():
    heavy = ("torch", "transformers", "mlflow", "datasets", "pandas")
    code = (
        f"import sys, dualspeed.cli, dualspeed.settings.jobs; print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wrong_setting_of_a_command_is_one_line(tmp_path):
    file = jobs.write_settings(load().finetune_settings(load().rows[0]), tmp_path)
    content = json.loads(file.read_text())
    content["settings"]["recipe"]["training_arguments"] = {"learning_rate": "2e-5"}
    file.write_text(json.dumps(content))
    command = [sys.executable, "-m", "dualspeed.cli", "train", "--settings", str(file)]
    folders = [word for name in ("model", "data", "state", "out") for word in (f"--{name}", str(tmp_path / name))]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "recipe.training_arguments.learning_rate: '2e-5' is of type str; valid: float" in done.stderr


def test_json_text_instead_of_a_settings_file_is_refused_in_one_sentence():
    command = [sys.executable, "-m", "dualspeed.cli", "demo-data", "--settings", "{}", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "argument --settings: JSON text; valid: the path of a file that holds it" in done.stderr


@pytest.mark.parametrize("command", ["compare a b --configfile missing.yaml", "plan --config missing"])
def test_a_missing_configuration_is_one_line(command):
    done = subprocess.run([sys.executable, "-m", "dualspeed.cli", *command.split()], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No such file" in done.stderr, done.stderr

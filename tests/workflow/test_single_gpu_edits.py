"""Jobs that an edit of config/single-gpu runs again after a whole run: each line of the table in config/README.md."""

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tests.support.workflow import (
    KEPT,
    Edit,
    copy_project,
    edit_code,
    edit_config,
    edit_rows,
    plan,
    stub_outputs,
    touch_everything,
)

pytestmark = pytest.mark.slow
NAME = "single-gpu"
OWN = ("--configfile", f"config/{NAME}/config.yaml")
QWEN, SMOLVLM = MODELS = ("qwen2.5-vl-3b", "smolvlm-256m")
METHODS = ("baseline", "naive_prune-divprune-p0.9", "dualspeed-divprune-p0.9")
ROWS = {model: tuple(f"{model}-{method}" for method in METHODS) for model in MODELS}
ALL = (*ROWS[QWEN], *ROWS[SMOLVLM])
DUALSPEED = ROWS[QWEN][2]
TABLES = {
    f"Write tables and figures of the sheet {NAME}",
    f"Write the page that shows the sheet {NAME}: results/report-{NAME}.html",
}
STORE = {"Make sure of the MLflow store"}


def evaluate(*rows: str) -> set[str]:
    return {f"{job}, full tokens" for row in rows for job in (f"Answer the benchmarks with {row}", f"Score {row}")}


def finetune(*rows: str) -> set[str]:
    """Jobs that train, evaluate and show; the sheet's first row also shows what pruners keep."""
    return {f"Finetune {row}" for row in rows} | evaluate(*rows) | TABLES | (KEPT if ALL[0] in rows else set())


def time(model: str, *names: str) -> set[str]:
    names = names or ("p0.9-l0-plain", "p0.9-l4-distilled")
    return {f"Time the steps of {model}-divprune-{name}-*, alone on this machine" for name in names}


def prepare(*models: str, stage: str = "finetune") -> set[str]:
    return {f"Check and prepare the {stage} data of {model}" for model in models}


def cell(column: str, value: object) -> Edit:
    """An edit of one cell of the row DUALSPEED."""
    return edit_rows(lambda rows: rows[DUALSPEED].update({column: value}), name=NAME)


def config(change: Callable[[dict], object]) -> Edit:
    return edit_config(change, name=NAME)


def recipe_of(content: dict) -> dict:
    """Qwen's recipe, whose lists are its own: YAML's anchors are equal objects."""
    recipe = content["models"][QWEN]["stages"]["finetune"]
    recipe |= copy.deepcopy(recipe)
    return recipe


def add_row(rows: dict[str, dict]) -> None:
    rows["new"] = rows[DUALSPEED] | {"id": "new", "slow_mode_ratio": "0.2"}


def add_pretraining(content: dict) -> None:
    stages = content["models"][QWEN]["stages"]
    stages["pretrain"] = {key: value for key, value in recipe_of(content).items() if key != "lora"}


def hold_out(project: Path) -> None:
    """Validate on a file of the user's own."""
    (project / "mine.json").write_text("[]")
    (project / "pictures").mkdir()
    change = {"validation_annotations": "mine.json", "validation_steps": 9, "images": "pictures"}
    config(lambda content: recipe_of(content).update(change))(project)


def add_benchmark(project: Path) -> None:
    (project / "mme").mkdir()
    config(lambda content: content["benchmarks"].update(mme={"folder": "mme"}))(project)


def add_download(content: dict) -> None:
    content["downloads"]["benchmarks"]["files"].append({"url": "https://example.org/more.zip", "unpack": "."})


def launch(content: dict) -> None:
    recipe_of(content)["accelerate_config"] = "config/accelerate/fsdp2.yaml"


def ask_for_more(content: dict) -> None:
    content["models"][QWEN]["resources"] = {job: {"gpu": 4, "cpus": 8} for job in ("finetune", "answer", "speed")}


def comment(project: Path) -> None:
    for file in ("config.yaml", "experiments.tsv"):
        with (project / f"config/{NAME}" / file).open("a") as opened:
            opened.write("# a comment\n")


def set_block(name: str, **values: object) -> Edit:
    return config(lambda content: content.setdefault(name, {}).update(values))


OF_QWENS_DATA = prepare(QWEN) | finetune(*ROWS[QWEN]) | time(QWEN)
# Line of the table in config/README.md -> (edit, jobs of the dry run) of each way to show it.
LINES: dict[str, list[tuple[Edit, set[str]]]] = {
    "a row's `pruner` or `pruning_ratio`": [
        (
            cell("pruner", "random"),
            finetune(DUALSPEED) | {f"Time the steps of {QWEN}-random-p0.9-l4-distilled-*, alone on this machine"},
        ),
        (cell("pruning_ratio", "0.8"), finetune(DUALSPEED) | time(QWEN, "p0.8-l4-distilled")),
    ],
    "a row's `num_virtual_tokens`": [
        (cell("num_virtual_tokens", "8"), finetune(DUALSPEED) | time(QWEN, "p0.9-l8-distilled"))
    ],
    "a row's `seed`": [(cell("seed", "5"), finetune(DUALSPEED))],
    "a row's `slow_mode_ratio`, `slow_steps`, `max_steps` or `distillation_weight`": [
        (cell("slow_mode_ratio", "0.2"), finetune(DUALSPEED)),
        (cell("slow_steps", "20"), finetune(DUALSPEED)),
        (cell("max_steps", "500"), finetune(DUALSPEED)),
        (cell("distillation_weight", "0"), finetune(DUALSPEED) | time(QWEN, "p0.9-l4-plain")),
    ],
    "a row's `tables`": [
        (cell("tables", "figure4"), TABLES),
        (cell("tables", "table2"), TABLES | {job.replace("full", "pruned") for job in evaluate(DUALSPEED)}),
    ],
    "a new row": [(edit_rows(add_row, name=NAME), {"Finetune new"} | evaluate("new") | TABLES)],
    "a removed row": [(edit_rows(lambda rows: rows.pop(DUALSPEED), name=NAME), TABLES)],
    "`stages.finetune.training_arguments`": [
        (
            config(lambda content: recipe_of(content)["training_arguments"].update(learning_rate=5.0e-5)),
            finetune(*ROWS[QWEN]),
        )
    ],
    "`stages.pretrain.training_arguments`": [],  # there is no pretraining
    "a stage `pretrain`, added or removed": [
        (
            config(add_pretraining),
            finetune(*ROWS[QWEN])
            | prepare(QWEN, stage="pretrain")
            | {f"Pretrain {QWEN}-full-seed0-*", f"Pretrain {QWEN}-fast-seed0-*"},
        )
    ],
    "a stage's `annotations`, `chat_template` or `max_length`, or a source, share or limit of its `data`": [
        (config(lambda content: recipe_of(content)["data"][0].update(limit=9000)), OF_QWENS_DATA),
        (config(lambda content: recipe_of(content)["data"].pop()), OF_QWENS_DATA),
        (config(lambda content: recipe_of(content).update(max_length=1024)), OF_QWENS_DATA),
        (config(lambda content: recipe_of(content).update(chat_template="turns")), OF_QWENS_DATA),
    ],
    "a stage's `validation_annotations`": [(hold_out, OF_QWENS_DATA)],
    "a stage's `validation_steps`": [],  # there is no validation
    "a new benchmark": [(add_benchmark, evaluate(*ALL) | TABLES)],
    "`inference.*`": [(set_block("inference", max_new_tokens=8), evaluate(*ALL) | TABLES)],
    "`data.*` (the demo's, at the top)": [(set_block("data", seed=7), set())],  # no model is the demo's
    "`downloads.<source>`": [
        (config(add_download), {"Download benchmarks"} | evaluate(*ALL) | TABLES | KEPT),
    ],
    "`base_model.*`": [(set_block("base_model", seed=7), set())],
    "a model's `parts`": [],  # no model has parts
    "`plan.*`": [(set_block("plan", gpu="h100"), set())],
    "`accelerate_config`": [(config(launch), set())],
    "`cache_features`": [(config(lambda content: recipe_of(content).update(cache_features="kept")), set())],
    "`models.<model>.resources`": [(config(ask_for_more), set())],
    "`tracking.*`": [(set_block("tracking", uri="sqlite:///elsewhere.db"), STORE)],
    "a file touched, its content unchanged": [(touch_everything, set())],
    "`snakemake --config experiments=...` and back": [(lambda project: None, set())],
    "a comment or blank line in either file": [(comment, set())],
    "code or package versions": [(edit_code, set())],
}
EDITS = {f"{line} {number}": edit for line, edits in LINES.items() for number, edit in enumerate(edits)}


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[str, set[str]]:
    """Dry run of each edit of a project in which Snakemake takes every job for done, two at a time."""
    root = tmp_path_factory.mktemp("edited")
    (root / "finished").mkdir()
    finished = copy_project(root / "finished")
    stub_outputs(finished, *OWN)

    def plan_edit(numbered: tuple[int, str]) -> set[str]:
        project = shutil.copytree(finished, root / str(numbered[0]))
        EDITS[numbered[1]][0](project)
        return plan(project, *OWN)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(EDITS, pool.map(plan_edit, enumerate(EDITS)), strict=True))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_runs_again_what_depends_on_it(plans, edit):
    assert plans[edit] == EDITS[edit][1]


def test_every_line_of_the_readme_is_an_edit_here():
    table = (REPOSITORY / "config/README.md").read_text().partition("| edit | runs again |\n|---|---|\n")[2]
    lines = [line.split(" | ")[0].removeprefix("| ") for line in table.split("\n\n")[0].strip().splitlines()]
    assert sorted(lines) == sorted(LINES)

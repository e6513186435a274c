"""`dualspeed finetune` and `dualspeed generate`: from a command to a model that answers, a kill in between."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualspeed import DualSpeedModel
from dualspeed.cli import main
from dualspeed.settings.finetune import known_options, read_options
from dualspeed.training import finetune
from tests.support.paths import REPOSITORY
from tests.support.sft import ANSWERS, FAMILY
from tests.support.tiny_chat import tiny_chat

STEPS = "--max_steps 4 --per-device-train-batch-size 2 --learning_rate 1e-2 --logging_steps 1 --use_cpu --disable_tqdm"
METHOD = "--pruning_ratio 0.7 --slow_mode_ratio 0.5 --mode_schedule stratified"
SAVED = ("model.safetensors", "mode_isolator.safetensors")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder with a tiny model in `base`, and rows with pictures in `rows.json` and `pictures`."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_chat(FAMILY, folder / "base")
    (folder / "pictures").mkdir()
    rows = []
    for number, answer in enumerate(ANSWERS):
        Image.new("RGB", (28, 28), (30 * number, 0, 90)).save(folder / "pictures" / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def arguments(inputs, out, *others: str) -> list[str]:
    given = f"--model {inputs / 'base'} --data {inputs / 'rows.json'} --images {inputs / 'pictures'} --output-dir {out}"
    return ["finetune", *given.split(), *STEPS.split(), *METHOD.split(), *others]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as context:
        context.setattr(finetune, "NUM_BATCHES", 1)
        context.setattr(finetune, "REPEATS", 1)
        assert main(arguments(inputs, out, "--save_steps", "2", "--compare")) == 0
    return out


def test_the_finished_model_is_stock_and_told(inputs, finished, capsys):
    assert AutoModelForImageTextToText.from_pretrained(finished) and AutoProcessor.from_pretrained(finished)
    model = DualSpeedModel.from_pretrained(finished)
    assert (model.dualspeed.pruning_ratio, model.dualspeed.mode_schedule) == (0.7, "stratified")
    assert main(arguments(inputs, finished, "--logging_steps", "2")[:-2]) == 0  # nothing is trained again
    out = capsys.readouterr().out
    assert f"saved: {finished}, a stock checkpoint with mode_isolator.safetensors beside it" in out
    assert "2 fast and 2 slow steps, peak memory" in out
    compared = json.loads((finished / "finetune.json").read_text())["result"]["compared"]
    mean = (compared["fast_step_seconds"] + compared["slow_step_seconds"]) / 2
    assert compared["ratio"] == pytest.approx(compared["baseline_step_seconds"] / mean)
    assert f"{compared['ratio']:.2f} times faster" in out


def test_comparing_leaves_the_model_as_it_was(inputs, finished, tmp_path):
    assert main(arguments(inputs, tmp_path / "out")) == 0
    assert "compared" not in json.loads((tmp_path / "out" / "finetune.json").read_text())["result"]
    for file in SAVED:
        one, other = load_file(finished / file), load_file(tmp_path / "out" / file)
        assert all(torch.equal(one[name], other[name]) for name in one), file


@pytest.mark.slow
@pytest.mark.parametrize("step, others", [(1, ()), (3, ()), (3, ("--lora_rank", "4", "--lora_dropout", "0.1"))])
def test_killed_and_run_again_equals_uninterrupted(inputs, finished, tmp_path, step, others):
    given = arguments(inputs, tmp_path / "out", "--save_steps", "2", *others)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.killed_finetune", str(step), *given]
    killed = subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=200, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "checkpoint-2").exists() is (step == 3)
    assert main(given) == 0
    whole = finished
    if others:
        whole = tmp_path / "whole"
        assert main(arguments(inputs, whole, "--save_steps", "2", *others)) == 0
    for file in (*SAVED, *(("adapter/adapter_model.safetensors",) if others else ())):
        one, other = load_file(whole / file), load_file(tmp_path / "out" / file)
        assert all(torch.equal(one[name], other[name]) for name in one), file


def test_adapters_by_options_of_a_yaml_file(inputs, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("lora_rank: 4\nlora_alpha: 8\nlearning_rate: 1.0e-3\nmax_steps: 9\n")
    assert main(arguments(inputs, tmp_path / "out", "--config", str(file))) == 0
    settings = json.loads((tmp_path / "out" / "finetune.json").read_text())["settings"]
    assert (settings["lora_rank"], settings["learning_rate"], settings["max_steps"]) == (4, 1e-2, 4)  # options first
    assert "with mode_isolator.safetensors and adapter beside it" in capsys.readouterr().out
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


WRONG = {
    "an option twice": (["--seed", "1", "--seed", "2"], "--seed: given twice; valid: once"),
    "no option": (["--learning-rat", "1"], "--learning-rat: unknown option (did you mean 'learning_rate'?)"),
    "no number": (["--warmup_steps", "few"], "--warmup_steps: 'few'; valid: float"),
    "out of range": (["--distillation_weight", "-1"], "options: distillation_weight: -1.0 is out of range"),
    "no such value": (["--optim", "adamm"], "optim: 'adamm' is unknown (did you mean"),
    "a GPU where none is": (["--bf16", "--no-cpu"], "bf16: needs a GPU, and torch finds none; valid: without it"),
    "4 bits where no GPU is": (["--lora_quantize"], "lora_quantize: needs a GPU"),
    "no model": (["--model", "tests/support"], "--model tests/support: can't be loaded:"),
    "a split of files": (["--split", "train"], "split: 'train' of"),
    "arguments that don't go together": (["--eval_strategy", "steps"], "eval"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_sentence(inputs, tmp_path, capsys, name):
    others, message = WRONG[name]
    given = arguments(inputs, tmp_path / "out", *[other for other in others if other != "--no-cpu"])
    if "--no-cpu" in others:
        given.remove("--use_cpu")
    if others[0] == "--model":
        del given[1:3]
    assert main(given) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dualspeed finetune: ") and message in error


def test_a_key_that_is_none_is_named_with_its_file(inputs, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("pruning_ration: 0.9\n")
    assert main(arguments(inputs, tmp_path / "out", "--config", str(file))) == 1
    assert f"{file}: pruning_ration: unknown key (did you mean 'pruning_ratio'?)" in capsys.readouterr().err
    file.write_text("seed: 1\nseed: 2\n")
    assert main(arguments(inputs, tmp_path / "out", "--config", str(file))) == 1
    assert "the key 'seed' is there twice" in capsys.readouterr().err


def test_a_folder_of_another_run_is_refused(inputs, finished, tmp_path, capsys):
    assert main([*arguments(inputs, finished), "--seed", "7"]) == 1
    assert "holds a run with seed 42, not 7; valid: the same settings, or another" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert main(arguments(inputs, tmp_path)) == 1
    assert "holds notes.txt, which is of no such run; valid: a new or empty folder" in capsys.readouterr().err


def test_help_names_every_option_and_loads_no_torch():
    code = "import sys; from dualspeed.cli import main\ntry: main(['finetune', '--help'])\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in known_options():
        assert f"--{name} " in done.stdout or f"--{name}," in done.stdout
    assert {"pruner", "lora_rank", "learning_rate", "model"} <= set(known_options())


def test_options_are_typed():
    text = '--model m --data d --output-dir o --report_to tensorboard mlflow --lr_scheduler_kwargs {"num_cycles":2}'
    settings = read_options(text.split())
    assert settings.training_arguments["report_to"] == ["tensorboard", "mlflow"]
    assert settings.training_arguments["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert settings.lora is None


def test_generate_streams_an_answer_in_either_mode(inputs, finished, capsys):
    answers = {}
    for mode in ("slow", "fast"):
        given = f"--model {finished} --image {inputs / 'pictures' / '1.png'} --mode {mode} --max-new-tokens 4"
        assert main(["generate", *given.split(), "--prompt", "What is 1?"]) == 0
        answers[mode] = capsys.readouterr().out
    assert all(answer.endswith("\n") for answer in answers.values())
    assert main(["generate", "--model", str(finished), "--image", "none.png", "--prompt", "?"]) == 1
    assert "none.png" in capsys.readouterr().err.splitlines()[-1]
    assert main(["generate", "--model", "tests/support", "--prompt", "?"]) == 1
    assert "--model tests/support: can't be loaded" in capsys.readouterr().err.splitlines()[-1]

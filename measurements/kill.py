"""Kill a small training at random moments, resume it, and compare it with an undisturbed one.

    python -m measurements.kill [--kills 30] [--seed 0]

Each job is killed (SIGKILL) while it starts, between steps, or while it writes a checkpoint; the seed decides. The next
job resumes from the files that it finds. The training has enough steps for all kills. Exit status 1 if a weight
differs, or a step is logged twice or not at all.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from dualspeed.layout import METRICS_FILE
from dualspeed.settings.jobs import write_settings
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.recipe import Recipe
from dualspeed.settings.stage import StageSettings
from dualspeed.training.resume import UNFINISHED
from tests.support import tiny

SAVE_STEPS = 5
STEPS_PER_KILL = 50
MOMENTS = ("starting", "training", "training", "writing a checkpoint", "writing a checkpoint")
POLL_SECONDS = 0.001


def main() -> int:
    """Print a line a kill and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        kills, problems = kill_and_compare(Path(folder), options.kills, options.seed, say=print)
        found = (
            f"{len(problems)} problems: {'; '.join(problems)}" if problems else "same weights, every step logged once"
        )
        print(f"{sum(kills.values())} kills ({dict(kills)}) in {time.monotonic() - began:.0f} s: {found}")
    return 1 if problems else 0


def kill_and_compare(
    folder: Path, num_kills: int, seed: int, say: Callable[[str], object] = lambda line: None
) -> tuple[Counter[str], list[str]]:
    """Train once undisturbed and once with `num_kills` kills; returns the kills by moment, and the differences."""
    make_inputs(folder)
    num_steps = STEPS_PER_KILL * (num_kills + 1)
    undisturbed = start(folder, "undisturbed", num_steps)
    draw, kills = random.Random(seed), Counter()
    for number in range(num_kills):
        process = start(folder, "killed", num_steps)
        moment = draw.choice(MOMENTS)
        wait_for_moment(folder / "killed", process, moment, draw)
        if process.poll() is not None:
            raise RuntimeError(f"the training ended by itself before kill {number + 1}: {read_log(folder / 'killed')}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills[moment] += 1
        say(f"kill {number + 1}: {moment}, at step {len(logged_steps(folder / 'killed'))} of {num_steps}")
    for name, process in (("killed", start(folder, "killed", num_steps)), ("undisturbed", undisturbed)):
        if process.wait() != 0:
            raise RuntimeError(read_log(folder / name))
    return kills, compare(folder, num_steps)


def make_inputs(folder: Path) -> None:
    """Write a tiny LLaVA and 36 conversations, each with a picture."""
    tiny.make_llava(folder / "base")
    rows = []
    for index in range(36):
        path = folder / f"{index}.png"
        Image.new("RGB", (28, 28), ((index * 40) % 256, (index * 90) % 256, 128)).save(path)
        question = [{"type": "image", "text": None}, {"type": "text", "text": "is there a red digit ?"}]
        answer = [{"type": "text", "text": "yes" if index % 2 else "no"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"id": str(index), "messages": messages, "images": [str(path)], "num_tokens": 30})
    Dataset.from_list(rows).save_to_disk(folder / "data")


def start(folder: Path, name: str, num_steps: int) -> subprocess.Popen:
    """Start the training as the workflow does; its log is `<name>.log`."""
    arguments = {"use_cpu": True, "max_steps": num_steps, "learning_rate": 1e-3, "logging_steps": 1}
    arguments |= {"save_strategy": "steps", "save_steps": SAVE_STEPS, "dataloader_num_workers": 1, "disable_tqdm": True}
    recipe = Recipe(
        annotations="-", images="-", chat_template="turns", global_batch_size=4, training_arguments=arguments
    )
    method = DualSpeedConfig(slow_mode_ratio=0.4, pruning_ratio=0.7)
    settings = StageSettings(stage="finetune", seed=0, recipe=recipe, dualspeed=method)
    file = write_settings(settings, folder / "settings")
    command = [sys.executable, "-m", "dualspeed.cli", "train", "--settings", file]
    command += ["--model", folder / "base", "--data", folder / "data"]
    command += ["--state", folder / name / "state", "--out", folder / name / "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for_moment(run: Path, process: subprocess.Popen, moment: str, draw: random.Random) -> None:
    """Wait for a random moment of the kind `moment`, or for the end of the process."""
    if moment == "starting":
        time.sleep(draw.uniform(0, 8))
        return
    before = len(logged_steps(run))
    is_writing = moment == "writing a checkpoint"
    while process.poll() is None:
        if len(logged_steps(run)) > before and (
            not is_writing or list(run.glob(f"state/*/checkpoints/{UNFINISHED}/*"))
        ):
            break
        time.sleep(POLL_SECONDS)
    time.sleep(draw.uniform(0, 0.05 if is_writing else 0.5))


def logged_steps(run: Path) -> list[int]:
    """Steps with a loss in the metrics file, in the order of its lines."""
    lines = [line for file in run.glob(f"state/*/{METRICS_FILE}") for line in file.read_text().split("\n")[:-1]]
    steps = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill
            continue
        if "loss" in entry["metrics"]:
            steps.append(entry["step"])
    return steps


def compare(folder: Path, num_steps: int) -> list[str]:
    """Differences of the killed training's result from the undisturbed one's."""
    problems = []
    for file in ("model.safetensors", "mode_isolator.safetensors"):
        killed, undisturbed = (load_file(folder / name / "out" / file) for name in ("killed", "undisturbed"))
        problems += [f"{name} differs" for name in undisturbed if not killed[name].equal(undisturbed[name])]
    if logged_steps(folder / "killed") != list(range(1, num_steps + 1)):
        problems.append("steps are logged twice, not at all, or out of order")
    return problems


def read_log(run: Path) -> str:
    """End of a run's log."""
    return run.with_suffix(".log").read_text()[-2000:]


if __name__ == "__main__":
    sys.exit(main())

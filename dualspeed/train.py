"""One stage of one run, from a checkpoint to the next: what `dualspeed train` does.

Everything that a killed job needs to go on lies in a state folder, named by a hash of all that decides the result:
settings, input weights, data. State of other settings is therefore never resumed.
"""

import json
import logging
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import ProcessorMixin, TrainerCallback, TrainingArguments, set_seed

from dualspeed.callbacks import MetricLogCallback
from dualspeed.config import StageSettings
from dualspeed.data.collator import ConversationCollator
from dualspeed.data.processing import load_processor
from dualspeed.efficiency import machine, peak_memory_bytes
from dualspeed.environment import environment
from dualspeed.files import atomic_folder, sha256_of_file, sha256_of_json, write_json
from dualspeed.modeling import DualSpeedModel
from dualspeed.modes import Mode
from dualspeed.recipe import batch_plan
from dualspeed.stages import hold_trained_weights_in_float32, set_trainable
from dualspeed.tracking import METRICS_FILE, MetricLog, ParentRun, RunSpec
from dualspeed.trainer import DualSpeedTrainer

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"


def train(
    settings: StageSettings,
    model_folder: Path,
    data_folder: Path,
    state_root: Path,
    out: Path,
    tracking: dict[str, str] | None = None,
    parent: dict[str, str] | None = None,
) -> None:
    """Run a stage from the checkpoint in `model_folder` on the prepared data in `data_folder`, and write it to `out`.

    Args:
        state_root: holds the state folders; a stage that was killed goes on where its last whole checkpoint is.
        tracking: MLflow's `uri` and `experiment`; None logs to the state folder alone.
        parent: `row` and `settings_hash` of the experiment that the run belongs to; None for a shared pretraining.
    """
    clock = Clock(state := open_state(state_root, settings, model_folder, data_folder))
    logger.info("state of this run: %s", state)
    model, processor = load_model(settings, model_folder)
    dataset = load_from_disk(data_folder)
    logger.info("%s on %d samples", settings.stage, len(dataset))
    spec = RunSpec(
        name=f"{settings.stage} {out.name}",
        parent=ParentRun(**parent) if parent else None,
        params=settings.to_dict(),
        tags={"stage": settings.stage} | ({"pretrain_key": out.name} if settings.stage == "pretrain" else {}),
    )
    is_first_process = os.environ.get("RANK", "0") == "0"
    with MetricLog(state, tracking, spec) if is_first_process else nullcontext() as metric_log:
        trainer = make_trainer(settings, model, processor, dataset, state)
        trainer.add_callback(clock)
        if metric_log:
            trainer.add_callback(MetricLogCallback(metric_log))
        trainer.train(resume_from_checkpoint=last_checkpoint(state / "checkpoints"))
        save(trainer, settings, state, out, clock.seconds())
    if trainer.is_world_process_zero():
        shutil.rmtree(state / "checkpoints", ignore_errors=True)  # all that they hold is in `out`


def open_state(state_root: Path, settings: StageSettings, model_folder: Path, data_folder: Path) -> Path:
    """The folder that holds the resumable state of this stage, with what decides its name."""
    identity = {
        "settings": settings.to_dict(),
        "model": fingerprint(model_folder, "*.safetensors", "config.json"),
        "data": fingerprint(data_folder, "*.arrow"),
    }
    state = state_root / sha256_of_json(identity)[:16]
    write_json(state / "settings.json", identity)
    return state


def fingerprint(folder: Path, *patterns: str) -> str:
    """Hash of the content of a folder's files of these patterns."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"{folder}: no {' or '.join(patterns)} in this folder")
    return sha256_of_json({path.name: sha256_of_file(path) for path in files})


def load_model(settings: StageSettings, folder: Path) -> tuple[DualSpeedModel, ProcessorMixin]:
    """The checkpoint as its stage trains it, and its processor with the stage's chat template."""
    set_seed(settings.seed)  # an isolator that the checkpoint doesn't have yet starts from the seed
    if (lora := settings.recipe.lora) is None:
        model = DualSpeedModel.from_pretrained(folder, settings.dualspeed)
    else:
        from dualspeed import adapters  # needs peft

        model = DualSpeedModel.from_pretrained(folder, settings.dualspeed, **adapters.quantization(lora))
        adapters.add_adapters(model.vlm, lora)
    set_trainable(model, settings.stage, with_vision=settings.recipe.vision_learning_rate is not None)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":  # whose optimizer holds float32 weights itself
        hold_trained_weights_in_float32(model)
    return model, load_processor(folder, settings.recipe.chat_template, settings.recipe.image_aspect_ratio)


def make_trainer(
    settings: StageSettings, model: DualSpeedModel, processor: ProcessorMixin, dataset: Dataset, state: Path
) -> DualSpeedTrainer:
    """The trainer of a stage; its checkpoints lie in the state folder."""
    recipe = settings.recipe
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_device_batch_size = recipe.per_device_batch_size or recipe.global_batch_size // num_processes
    arguments = TrainingArguments(
        **{
            "output_dir": str(state / "checkpoints"),
            "seed": settings.seed,
            "per_device_train_batch_size": per_device_batch_size,
            "gradient_accumulation_steps": batch_plan(recipe.global_batch_size, num_processes, per_device_batch_size),
            "logging_nan_inf_filter": False,
            "length_column_name": "num_tokens",
            "save_total_limit": 2,
            **recipe.training_arguments,
        }
    )
    return DualSpeedTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=ConversationCollator(processor, recipe.max_length),
        processing_class=processor,
        projector_learning_rate=recipe.projector_learning_rate,
        vision_learning_rate=recipe.vision_learning_rate,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint. The trainer's state is written last, so one that can be read ends a whole one."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / TRAINER_STATE).read_text())
            return str(checkpoint)
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s was cut off while it was written; an older one serves", checkpoint)
    return None


def save(trainer: DualSpeedTrainer, settings: StageSettings, state: Path, out: Path, seconds: float) -> None:
    """Write the stock checkpoint, the isolator, training.json and the metrics to `out`, whole or not at all."""
    trainer.save_dtype = trainer.accelerator.unwrap_model(trainer.model).stored_dtype
    if not trainer.is_world_process_zero():
        trainer.save_model(str(out))  # sharded weights are gathered from every process; only the first writes
        return
    with atomic_folder(out) as folder:
        trainer.save_model(str(folder))
        write_json(folder / "training.json", training_record(trainer, settings, seconds))
        # Figures read what the workflow declares, and state isn't.
        shutil.copyfile(state / METRICS_FILE, folder / METRICS_FILE)


def training_record(trainer: DualSpeedTrainer, settings: StageSettings, seconds: float) -> dict[str, Any]:
    """What a stage was and what it cost; `train_seconds` is its wall clock with loading, over all its resumes."""
    num_steps = trainer.state.global_step
    num_samples = num_steps * settings.recipe.global_batch_size
    losses = {key: value for entry in trainer.state.log_history for key, value in entry.items() if "loss" in key}
    return {
        "stage": settings.stage,
        "seed": settings.seed,
        "settings": settings.to_dict(),
        "train_seconds": seconds,
        "num_steps": num_steps,
        "num_slow_steps": sum(trainer.mode_of_step(step) is Mode.SLOW for step in range(num_steps)),
        "num_samples": num_samples,
        "samples_per_second": num_samples / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "num_processes": trainer.accelerator.num_processes,
        "final": losses,
        "machine": machine(),
        **environment(),
    }


class Clock(TrainerCallback):
    """Wall clock of a stage over all the jobs that it took: each checkpoint carries what went before it."""

    def __init__(self, state: Path) -> None:
        self.started = time.monotonic()
        checkpoint = last_checkpoint(state / "checkpoints")
        file = Path(checkpoint) / "seconds.json" if checkpoint else None
        self.before = json.loads(file.read_text()) if file and file.exists() else 0.0

    def seconds(self) -> float:
        """Seconds that the stage has taken so far."""
        return self.before + time.monotonic() - self.started

    def on_save(self, args, state, control, **kwargs) -> None:
        """Note the time in the checkpoint that was just written."""
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "seconds.json", self.seconds())

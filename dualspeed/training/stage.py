"""Training of one stage, from one checkpoint to the next: the job of `dualspeed train`.

A killed job resumes from its state folder (dualspeed.training.state).
"""

import logging
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import ProcessorMixin, TrainingArguments, set_seed

from dualspeed.cluster.run_lock import run_lock
from dualspeed.data.collator import ConversationCollator
from dualspeed.data.processing import load_processor
from dualspeed.device import machine, peak_memory_bytes
from dualspeed.environment import environment
from dualspeed.errors import IncompleteModelError, InterruptedTrainingError, ShardingError
from dualspeed.files import atomic_folder, write_json
from dualspeed.layout import METRICS_FILE, TRAINING_RECORD, VALIDATION_FOLDER
from dualspeed.method.checkpoint import check_checkpoint
from dualspeed.method.model import DualSpeedModel
from dualspeed.settings.identity import record
from dualspeed.settings.modes import Mode
from dualspeed.settings.recipe import batch_plan
from dualspeed.settings.stage import StageSettings
from dualspeed.tracking.delivery import ParentRun
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from dualspeed.tracking.store import Store
from dualspeed.training.callbacks import MetricLogCallback, StopInTime
from dualspeed.training.grouping import FULL_LENGTH, group_lengths
from dualspeed.training.resume import ResumableTrainer, unfinished_folder
from dualspeed.training.state import (
    CHECKPOINTS,
    check_num_processes,
    check_sharding,
    last_checkpoint,
    open_state,
    read_progress,
)
from dualspeed.training.token_batches import TokenBudgets, check_samples
from dualspeed.training.trainable import hold_trained_weights_in_float32, set_trainable
from dualspeed.training.validation import count_answers, mean_of_answers

logger = logging.getLogger(__name__)


def train(
    settings: StageSettings,
    model_folder: Path,
    data_folder: Path,
    state_root: Path,
    out: Path,
    tracking: Store | None = None,
    parent: ParentRun | None = None,
    time_limit: float | None = None,
    cache_features: str | None = None,
) -> None:
    """Train a stage from the checkpoint in `model_folder` on the prepared data in `data_folder`; write it to `out`.

    Args:
        state_root: folder of the state folders; a stage that was killed resumes from its last whole checkpoint there.
        tracking: MLflow store that metrics also go to; None: to the state folder alone.
        parent: run of the row that the training belongs to; None for a pretraining, which rows share.
        time_limit: minutes that this job has; training stops before with a checkpoint. None: no limit.
        cache_features: folder of kept features (dualspeed.training.stored_features); None: the tower runs.

    Raises:
        InterruptedTrainingError: the time was over, or SIGTERM came.
        RunIsLiveError: another job trains this very run.
        WorldSizeError, ShardingError: the run was started on another number of processes, or by another strategy.
        IncompleteModelError: what was saved is not whole; the checkpoints are still there.
    """
    started = time.monotonic()
    state = open_state(state_root, settings, model_folder, data_folder)
    logger.info("state of this run: %s", state)
    is_first_process = os.environ.get("RANK", "0") == "0"
    with StopInTime(time_limit) as stop, run_lock(state) if is_first_process else nullcontext():
        checkpoint = last_checkpoint(state / CHECKPOINTS)
        check_num_processes(checkpoint, world_size())
        model, processor = load_model(settings, model_folder)
        dataset, held_out = load_data(settings, data_folder)
        logger.info("%s on %d samples in %d processes", settings.stage, len(dataset), world_size())
        spec = run_spec(settings, out, parent)
        with MetricLog(state, tracking, spec) if is_first_process else nullcontext() as metric_log:
            started -= read_progress(checkpoint).get("seconds", 0.0)
            data = dataset, held_out
            trainer = make_trainer(settings, model, processor, *data, state / CHECKPOINTS, started, cache_features)
            check_strategy(trainer)
            check_sharding(checkpoint, trainer.sharding)
            trainer.add_callback(stop)
            if metric_log:
                trainer.add_callback(MetricLogCallback(metric_log))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if stop.reason:
                steps = f"{trainer.state.global_step} of {trainer.state.max_steps} steps"
                raise InterruptedTrainingError(f"{stop.reason}: {steps} are done and kept; start it again to go on")
            save(trainer, settings, state, out)
        if is_first_process:
            shutil.rmtree(state / CHECKPOINTS, ignore_errors=True)  # `out` has all of their content


def world_size() -> int:
    """Number of processes that train together, as set by their launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_strategy(trainer: ResumableTrainer) -> None:
    """Raise ShardingError if the launcher's file asks for shards, but each process has the whole model."""
    asked = {"ACCELERATE_USE_FSDP": trainer.is_fsdp_enabled, "ACCELERATE_USE_DEEPSPEED": trainer.is_deepspeed_enabled}
    for variable, is_enabled in asked.items():
        if os.environ.get(variable) == "true" and not is_enabled:
            kind, found = variable.rpartition("_")[2], trainer.accelerator.distributed_type.value
            raise ShardingError(
                f"accelerate_config: asks for {kind}, but accelerate shards on accelerators alone, and this is "
                f"{found}; valid on CPUs: no accelerate_config"
            )


def run_spec(settings: StageSettings, out: Path, parent: ParentRun | None) -> RunSpec:
    """Name, parameters and tags of the stage's run in MLflow."""
    return RunSpec(
        name=f"{settings.stage} {out.name}",
        parent=parent,
        params=record(settings),
        tags={"stage": settings.stage} | ({"pretrain_key": out.name} if settings.stage == "pretrain" else {}),
    )


def load_model(settings: StageSettings, folder: Path) -> tuple[DualSpeedModel, ProcessorMixin]:
    """Load the model, with the stage's parameters trainable, and its processor, with the stage's chat template."""
    set_seed(settings.seed)  # initialises the isolator, if the checkpoint has none
    attention = {"attn_implementation": settings.recipe.attn_implementation}
    if (lora := settings.recipe.lora) is None:
        model = DualSpeedModel.from_pretrained(folder, settings.dualspeed, **attention)
    else:
        from dualspeed.method import adapters  # needs peft

        model = DualSpeedModel.from_pretrained(folder, settings.dualspeed, **attention, **adapters.quantization(lora))
        adapters.add_adapters(model.vlm, lora)
    set_trainable(model, settings.stage, with_vision=settings.recipe.vision_learning_rate is not None)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":  # its optimizer holds float32 weights itself
        hold_trained_weights_in_float32(model)
    return model, load_processor(folder, settings.recipe.chat_template, settings.recipe.image_aspect_ratio)


def load_data(settings: StageSettings, folder: Path) -> tuple[Dataset, Dataset | None]:
    """Training samples and, for a stage with a validation, held-out samples."""
    has_validation = settings.recipe.validation_annotations is not None
    return load_from_disk(folder), load_from_disk(folder / VALIDATION_FOLDER) if has_validation else None


def make_trainer(
    settings: StageSettings,
    model: DualSpeedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    held_out: Dataset | None,
    checkpoints: Path,
    started: float,
    cache_features: str | None = None,
) -> ResumableTrainer:
    """Make the trainer of a stage.

    Args:
        held_out: validation samples; None: no validation.
        checkpoints: folder of the checkpoints to resume from.
        started: `time.monotonic()` at the start of the stage, as if nothing had interrupted it.
        cache_features: as for `train`.
    """
    recipe = settings.recipe
    if recipe.token_budgets:
        check_samples(dataset, TokenBudgets(**recipe.token_budgets), settings.dualspeed)
    dataset, length_column = group_lengths(dataset, settings.dualspeed)
    if held_out is not None:
        held_out, _ = group_lengths(held_out, settings.dualspeed)
    return ResumableTrainer(
        started=started,
        model=model,
        args=training_arguments(settings, checkpoints, length_column, held_out),
        train_dataset=dataset,
        eval_dataset=held_out,
        preprocess_logits_for_metrics=count_answers,
        compute_metrics=mean_of_answers,
        data_collator=ConversationCollator(
            processor,
            recipe.max_length,
            with_num_images=recipe.slow_per_device_batch_size is not None or recipe.tokens_per_batch is not None,
            question_tokenizer=model.question_tokenizer(processor),
            positions=model.positions(),
        ),
        processing_class=processor,
        projector_learning_rate=recipe.projector_learning_rate,
        vision_learning_rate=recipe.vision_learning_rate,
        slow_batch_size=recipe.slow_per_device_batch_size,
        tokens_per_batch=recipe.tokens_per_batch,
        slow_tokens_per_batch=recipe.slow_tokens_per_batch,
        cache_features=cache_features,
        packing=recipe.packing,
    )


def training_arguments(
    settings: StageSettings, checkpoints: Path, length_column: str, held_out: Dataset | None
) -> TrainingArguments:
    """Make a stage's `transformers.TrainingArguments`, for this number of processes; those of the recipe come last."""
    recipe, num_processes = settings.recipe, world_size()
    per_device_batch_size = recipe.per_device_batch_size or recipe.global_batch_size // num_processes
    arguments = {
        "output_dir": str(unfinished_folder(checkpoints)),
        "seed": settings.seed,
        "per_device_train_batch_size": per_device_batch_size,
        "gradient_accumulation_steps": batch_plan(recipe.global_batch_size, num_processes, per_device_batch_size),
        "logging_nan_inf_filter": False,
        "length_column_name": length_column,
    }
    if held_out is not None:
        # Validations run on full tokens, as slow steps do.
        eval_batch_size = recipe.slow_per_device_batch_size or per_device_batch_size
        if recipe.token_budgets:
            eval_batch_size = max(1, recipe.token_budgets["slow"] // max(held_out[FULL_LENGTH]))
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": recipe.validation_steps,
            "per_device_eval_batch_size": eval_batch_size,
        }
    return TrainingArguments(**arguments | recipe.training_arguments)


def save(trainer: ResumableTrainer, settings: StageSettings, state: Path, out: Path) -> None:
    """Write checkpoint, training record and metrics to `out`, all of them or none.

    Raises:
        IncompleteModelError: what was written doesn't load as the model that was trained; nothing else was changed.
    """
    if not trainer.is_world_process_zero():
        trainer.save_model(str(out))  # takes part in gathering sharded weights; only the first process writes
        return
    try:
        with atomic_folder(out) as folder:
            trainer.save_model(str(folder))
            write_json(folder / TRAINING_RECORD, training_record(trainer, settings))
            # Figures read declared outputs, and the state folder is none.
            shutil.copyfile(state / METRICS_FILE, folder / METRICS_FILE)
            check_output(trainer, settings, folder)
            sizes = file_sizes(folder)
        if lost := sorted(name for name, size in sizes.items() if file_sizes(out).get(name) != size):
            raise IncompleteModelError(f"{out}: {lost[0]} is missing or cut")
    except IncompleteModelError as error:
        raise IncompleteModelError(
            f"the trained model was not saved whole ({error}), so its checkpoints in {state / CHECKPOINTS} were kept; "
            "start the training again to save it from there"
        ) from error


def check_output(trainer: ResumableTrainer, settings: StageSettings, folder: Path) -> None:
    """Raise IncompleteModelError unless model and processor load from `folder`, and the records are there."""
    check_checkpoint(trainer.accelerator.unwrap_model(trainer.model), folder)
    try:
        load_processor(folder, settings.recipe.chat_template, settings.recipe.image_aspect_ratio)
    except Exception as error:  # transformers raises a dozen kinds for a missing or torn file
        raise IncompleteModelError(f"{folder}: no processor ({str(error).strip().splitlines()[0]})") from error
    for name in (TRAINING_RECORD, METRICS_FILE):
        if not (folder / name).is_file():
            raise IncompleteModelError(f"{folder / name}: missing")


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of each file below a folder, by its path from there."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def training_record(trainer: ResumableTrainer, settings: StageSettings) -> dict[str, Any]:
    """Settings, cost and last losses of a stage; `train_seconds` is wall clock over all jobs, without validations."""
    num_steps, seconds = trainer.state.global_step, trainer.seconds()
    num_samples = num_steps * settings.recipe.global_batch_size
    losses = {key: value for entry in trainer.state.log_history for key, value in entry.items() if "loss" in key}
    return {
        "stage": settings.stage,
        "seed": settings.seed,
        "settings": record(settings),
        "train_seconds": seconds,
        "num_steps": num_steps,
        "num_slow_steps": sum(trainer.mode_of_step(step) is Mode.SLOW for step in range(num_steps)),
        "num_samples": num_samples,
        "samples_per_second": num_samples / seconds,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        "device": trainer.args.device.type,
        "num_processes": trainer.accelerator.num_processes,
        "sharding": trainer.sharding,
        "final": losses,
        "machine": machine(trainer.args.device),
        **environment(),
    }

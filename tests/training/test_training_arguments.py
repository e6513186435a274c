"""Every field of TrainingArguments: it does what it does in the stock Trainer, or is refused with the reason.

A row names a value that differs from the default and what shows it. At a Baseline's settings ours and stock show the
same, and something else than with the default; and the same training runs in fast mode.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from dualspeed import DualSpeedTrainer
from dualspeed.errors import ConfigError
from tests.support import tiny
from tests.support.paths import REPOSITORY
from tests.support.stock import FAST, NOT_LOGITS, logged, make, weights

# Each batch has an image: without one, ours gives the projector gradients of 0 where stock gives none, and AdamW's
# momentum then moves it.
SEEN = Dataset.from_list([{"seed": seed, "num_images": 1 + seed % 2, "length": seed % 5} for seed in range(16)])
TINY = {"max_steps": 2, "train_dataset": SEEN, "eval_dataset": SEEN.select(range(0, 8, 2))}


def trained(trainer: Trainer) -> dict[str, Any]:
    """Log and sums of the weights after training."""
    set_seed(trainer.args.seed)
    trainer.train()
    return {
        "log": logged(trainer),
        "weights": {name: values.double().abs().sum().item() for name, values in weights(trainer).items()},
    }


def files(trainer: Trainer) -> dict[str, Any]:
    """Names of the files after training."""
    trainer.train()
    out = Path(trainer.args.output_dir)
    ours = ("mode_isolator.safetensors", "dualspeed.json")
    return {"files": sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.name not in ours)}


def best(trainer: Trainer) -> dict[str, Any]:
    """Best step of a training."""
    trainer.train()
    return {"step": trainer.state.best_global_step}


def loader(trainer: Trainer) -> dict[str, Any]:
    """Settings of the data loader."""
    made = trainer.get_train_dataloader()
    names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "in_order")
    context = getattr(made.multiprocessing_context, "_name", None)
    return {name: getattr(made, name) for name in names} | {"batches": len(made), "context": context}


def evaluated(trainer: Trainer) -> dict[str, Any]:
    """Metrics of an evaluation, and what `compute_metrics` got."""
    seen: list[Any] = []

    def metrics(predicted: Any, compute_result: bool = True) -> dict[str, float]:
        kinds = {name: type(getattr(predicted, name)).__name__ for name in ("label_ids", "inputs", "losses")}
        seen.append(kinds)
        return {"seen": len(seen)}

    trainer.compute_metrics = metrics
    found = trainer.evaluate(ignore_keys=NOT_LOGITS)
    numbers = {key: value for key, value in found.items() if "_per_" not in key and "time" not in key}
    kinds = [{name: "tensor" if "ensor" in kind else kind for name, kind in one.items()} for one in seen]
    return {"metrics": numbers, "kinds": kinds, "dtype": str(next(trainer.model.parameters()).dtype)}


def accelerated(trainer: Trainer) -> dict[str, Any]:
    """Settings that accelerate got."""
    handler = trainer.accelerator.ddp_handler
    names = ("bucket_cap_mb", "broadcast_buffers", "static_graph")
    settings = {name: getattr(handler, name, None) for name in names}
    config = trainer.accelerator.dataloader_config
    return settings | {"split_batches": config.split_batches, "seedable": config.use_seedable_sampler}


def said(trainer: Trainer) -> dict[str, Any]:
    """Verbosity of the log."""
    return {"verbosity": logging.get_verbosity(), "replica": trainer.args.log_level_replica}


def arguments_of(trainer: Trainer) -> dict[str, Any]:
    """Names and values that only callbacks or scripts read, as they arrive there."""
    held = trainer.args
    names = ("run_name", "project", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "log_on_each_node")
    return {name: getattr(held, name) for name in names} | {"disable_tqdm": held.disable_tqdm}


def progress(trainer: Trainer) -> dict[str, Any]:
    """Classes of the callbacks."""
    return {
        "callbacks": sorted(
            type(one).__name__ for one in trainer.callback_handler.callbacks if "Mode" not in type(one).__name__
        )
    }


@dataclass(frozen=True)
class Row:
    """A value of a field, and what shows it."""

    value: Any
    shows: Callable[[Trainer], dict[str, Any]] = trained
    beside: dict[str, Any] = field(default_factory=dict)
    """Further arguments, which the default is compared with as well."""
    differs: bool = True
    """False for a value whose effect this machine can't show, for the reason in `why`."""
    why: str = ""


SAVING = {"save_strategy": "steps", "save_steps": 1}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 1}
WORKERS = {"dataloader_num_workers": 1}
CUDA = "reaches code for CUDA alone"

WORKS: dict[str, Row] = {
    "output_dir": Row("elsewhere", lambda trainer: {"folder": Path(trainer.args.output_dir).name}),
    "per_device_train_batch_size": Row(2),
    "num_train_epochs": Row(1.0, beside={"max_steps": -1, "per_device_train_batch_size": 8}),
    "max_steps": Row(1),
    "learning_rate": Row(2e-2),
    "lr_scheduler_type": Row("constant"),
    "lr_scheduler_kwargs": Row({"num_cycles": 2.0}, beside={"lr_scheduler_type": "cosine"}),
    "warmup_steps": Row(2),
    "optim": Row("sgd"),
    "optim_args": Row("foreach=False,lr=0.1", beside={"optim": "adamw_torch"}, differs=False, why="the same numbers"),
    "weight_decay": Row(0.5),
    "adam_beta1": Row(0.5),
    "adam_beta2": Row(0.5),
    "adam_epsilon": Row(1e-2),
    "gradient_accumulation_steps": Row(2),
    "average_tokens_across_devices": Row(False, differs=False, why="one device; tests of two ranks have the rest"),
    "max_grad_norm": Row(0.01),
    "bf16": Row(True),
    "fp16": Row(True, differs=False, why="its rounding is below what is compared"),
    "bf16_full_eval": Row(True, evaluated),
    "fp16_full_eval": Row(True, evaluated),
    "activation_checkpointing": Row(
        True, differs=False, why="the same numbers; tests/training/test_trainer.py sees it"
    ),
    "activation_checkpointing_kwargs": Row(
        {"use_reentrant": False}, beside={"activation_checkpointing": True}, differs=False, why="the same numbers"
    ),
    "gradient_checkpointing": Row(True, differs=False, why="the former name of activation_checkpointing"),
    "gradient_checkpointing_kwargs": Row(
        {"use_reentrant": False}, beside={"gradient_checkpointing": True}, differs=False, why="the former name"
    ),
    "use_cache": Row(True, lambda trainer: {"use_cache": trainer.model.config.use_cache}),
    "neftune_noise_alpha": Row(5.0),
    "torch_empty_cache_steps": Row(1, differs=False, why=CUDA),
    "logging_strategy": Row("no"),
    "logging_steps": Row(2),
    "logging_first_step": Row(True, beside={"logging_steps": 2}),
    "log_on_each_node": Row(False, arguments_of),
    "logging_nan_inf_filter": Row(False, differs=False, why="no loss is NaN here"),
    "include_num_input_tokens_seen": Row("all"),
    "log_level": Row("error", said),
    "log_level_replica": Row("error", said),
    "disable_tqdm": Row(False, progress),
    "report_to": Row(["mlflow"], progress),
    "run_name": Row("a name", arguments_of),
    "project": Row("a project", arguments_of),
    "eval_strategy": Row("steps", beside={"eval_steps": 1}),
    "eval_steps": Row(2, beside={"eval_strategy": "steps"}),
    "eval_delay": Row(2, beside=EVALUATING),
    "per_device_eval_batch_size": Row(1, lambda trainer: {"batches": len(trainer.get_eval_dataloader())}),
    "prediction_loss_only": Row(True, evaluated),
    "eval_on_start": Row(True, beside=EVALUATING),
    "eval_do_concat_batches": Row(False, evaluated),
    "eval_use_gather_object": Row(True, evaluated, differs=False, why="one process"),
    "eval_accumulation_steps": Row(1, evaluated, differs=False, why="the same numbers in less memory"),
    "include_for_metrics": Row(["inputs", "loss"], evaluated),
    "batch_eval_metrics": Row(True, evaluated),
    "save_only_model": Row(True, files, beside=SAVING),
    "save_strategy": Row("steps", files, beside={"save_steps": 1}),
    "save_steps": Row(1, files, beside={"save_strategy": "steps"}),
    "save_on_each_node": Row(True, files, beside=SAVING, differs=False, why="one node"),
    "save_total_limit": Row(1, files, beside=SAVING),
    "enable_jit_checkpoint": Row(True, progress),
    "metric_for_best_model": Row("eval_loss", best, beside=EVALUATING | SAVING),
    "greater_is_better": Row(True, best, beside=EVALUATING | SAVING | {"metric_for_best_model": "eval_loss"}),
    "full_determinism": Row(True, lambda trainer: {"deterministic": torch.are_deterministic_algorithms_enabled()}),
    "seed": Row(7),
    "data_seed": Row(7),
    "accelerator_config": Row({"split_batches": True}, accelerated),
    "dataloader_drop_last": Row(True, loader, beside={"per_device_train_batch_size": 3}),
    "dataloader_num_workers": Row(1, loader),
    "dataloader_pin_memory": Row(False, loader, differs=False, why="there is no accelerator to pin memory for"),
    "dataloader_persistent_workers": Row(True, loader, beside=WORKERS),
    "dataloader_prefetch_factor": Row(3, loader, beside=WORKERS),
    "dataloader_multiprocessing_context": Row("spawn", loader, beside=WORKERS),
    "dataloader_in_order": Row(False, loader, beside=WORKERS),
    "label_names": Row(["labels"], differs=False, why="the only name that a language model's loss has"),
    "train_sampling_strategy": Row("sequential"),
    "length_column_name": Row("seed", beside={"train_sampling_strategy": "group_by_length"}),
    "ddp_bucket_cap_mb": Row(3, accelerated),
    "ddp_broadcast_buffers": Row(False, accelerated),
    "ddp_static_graph": Row(True, accelerated),
    "ddp_timeout": Row(60, differs=False, why="one process"),
    "skip_memory_metrics": Row(
        False, lambda trainer: {"memory": sorted(key for key in trainer.train().metrics if "mem" in key)}
    ),
    "do_train": Row(True, arguments_of),
    "do_eval": Row(True, arguments_of),
    "do_predict": Row(True, arguments_of),
    "resume_from_checkpoint": Row("a folder", arguments_of),
    "debug": Row("underflow_overflow", lambda trainer: trainer.train() and {"hooks": has_debug_hooks(trainer)}),
}
OURS = {
    "load_best_model_at_end": "tests/training/test_stock_promises.py; stock finds no weight by LLaVA's saved names",
    "label_smoothing_factor": "tests/training/test_stock_promises.py: right where stock forgets to shift",
    "auto_find_batch_size": "tests/training/test_stock_promises.py",
    "ignore_data_skip": "tests/training/test_stock_promises.py",
    "restore_callback_states_from_checkpoint": "tests/training/test_trainer_methods.py",
    "remove_unused_columns": "always False: columns are inputs of the collator",
    "ddp_find_unused_parameters": "False where it is None: every parameter is in every step's graph",
    "fsdp": "tests/training/test_sharding.py",
    "fsdp_config": "tests/training/test_sharding.py",
    "deepspeed": "tests/training/test_sharding.py",
    "push_to_hub": "tests/training/test_hub.py, from a local stand-in",
    "hub_model_id": "tests/training/test_hub.py",
    "hub_token": "tests/training/test_hub.py",
    "hub_strategy": "tests/training/test_hub.py",
    "hub_private_repo": "tests/training/test_hub.py",
    "hub_always_push": "tests/training/test_hub.py",
    "hub_revision": "tests/training/test_hub.py",
    "ddp_backend": "needs a launcher: tests/training/test_distributed.py",
    "use_cpu": "every test here",
    "local_rank": "set by the launcher: tests/training/test_distributed.py",
    "optim_target_modules": "tests/training/test_rare_arguments.py",
    "torch_compile": "tests/training/test_rare_arguments.py",
    "torch_compile_backend": "tests/training/test_rare_arguments.py",
    "torch_compile_mode": "tests/training/test_rare_arguments.py",
    "use_liger_kernel": "tests/training/test_rare_arguments.py",
    "liger_kernel_config": "tests/training/test_rare_arguments.py",
    "tf32": "tests/training/test_rare_arguments.py",
    "parallelism_config": "test_parallelism_is_refused",
    "trackio_space_id": "read by its callback alone",
    "trackio_bucket_id": "read by its callback alone",
    "trackio_static_space_id": "read by its callback alone",
}
"""Fields that the table can't compare -> where they are tested, or what holds."""


NAMES = {one.name for one in fields(TrainingArguments)}
SINCE_5_23 = {"activation_checkpointing", "activation_checkpointing_kwargs"}
"""Fields that transformers before 5.23 knows by their former names alone."""


def has_debug_hooks(trainer: Trainer) -> bool:
    return any(
        "DebugUnderflowOverflow" in repr(hook)
        for module in trainer.model.modules()
        for hook in module._forward_hooks.values()
    )


def shown(kind: type, folder: Path, row: Row, name: str | None, **given: Any) -> dict[str, Any]:
    """Observation of a trainer with the row's value for the field `name`, or with the default if that is None."""
    arguments = TINY | row.beside | ({} if name is None else {name: row.value}) | given
    if name == "output_dir":
        arguments["output_dir"] = str(folder / row.value)
    try:
        trainer = make(kind, folder, tiny.llava(), **arguments)
        return row.shows(trainer)
    finally:
        torch.use_deterministic_algorithms(False)
        logging.set_verbosity_warning()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def modules_are_no_garbage():
    """Objects of the imported modules stay out of the collector's sight, which is most of the table's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_every_field_has_a_row():
    assert (WORKS.keys() | OURS.keys()) - (SINCE_5_23 - NAMES) == NAMES
    assert not WORKS.keys() & OURS.keys()
    named = [
        word.rstrip(";:,") for place in OURS.values() for word in place.split() if word.startswith(("test_", "tests/"))
    ]
    assert "test_parallelism_is_refused" in named
    for place in named:
        assert (REPOSITORY / place).is_file() if place.startswith("tests/") else place in globals(), place


DEFAULTS: dict[str, dict[str, Any]] = {}
"""Observations of the stock Trainer with the default, by the other arguments."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKS if name in NAMES])
def test_a_field_does_what_it_does_in_the_stock_trainer(tmp_path, name):
    row = WORKS[name]
    stock = shown(Trainer, tmp_path / "stock", row, name)
    assert_alike(shown(DualSpeedTrainer, tmp_path / "ours", row, name), stock)
    assert shown(DualSpeedTrainer, tmp_path / "fast", row, name, dualspeed=FAST)
    assert bool(row.why) is not row.differs
    if row.differs:
        key = f"{row.shows} {row.beside}"
        if key not in DEFAULTS:
            DEFAULTS[key] = shown(Trainer, tmp_path / "default", row, None)
        with pytest.raises(AssertionError):
            assert_alike(DEFAULTS[key], stock)


def assert_alike(found: Any, expected: Any) -> None:
    """Numbers are near, what else is expected is equal; `found` may have more."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert name in found
            assert_alike(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-3, abs=1e-5) if isinstance(expected, float) else expected)


def test_parallelism_is_refused(tmp_path):
    from accelerate.parallelism_config import ParallelismConfig

    with pytest.raises(ConfigError, match="parallelism_config"):
        make(DualSpeedTrainer, tmp_path, parallelism_config=ParallelismConfig(cp_size=2))

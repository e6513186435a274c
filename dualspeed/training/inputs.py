"""Hashes of all that decides the result of a stage beside its settings: files, and what launched the processes."""

import os
from pathlib import Path
from typing import Any

from dualspeed.chat_templates import template_in_use
from dualspeed.files import sha256_of_json
from dualspeed.fingerprints import checkpoint_fingerprint, dataset_fingerprint
from dualspeed.settings.names import TEXT_PRUNERS
from dualspeed.settings.sharding import read_deepspeed
from dualspeed.settings.stage import StageSettings

LAUNCHER = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_DOWNCAST_BF16")
"""Variables by which `accelerate launch` hands on what of its file decides a result."""
DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
SHARES = (
    *(
        "zero_optimization",
        "activation_checkpointing",
        "aio",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ),
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "flops_profiler", "comms_logger"),
    *("tensorboard", "wandb", "csv_monitor"),
)
"""Keys of DeepSpeed's file that say how processes share a model, and what they print.

The sums are the same, up to the order that numbers are added in; and checkpoints of one way of sharing are refused by
another (dualspeed.training.state).
"""


def hashes_of_inputs(settings: StageSettings, model_folder: Path, data_folder: Path) -> dict[str, Any]:
    """{input: hash} of a stage.

    Raises:
        CheckpointError: a folder has no weights, or no rows.
        ConfigError: DeepSpeed's file can't be read.
    """
    inputs = {
        "model": checkpoint_fingerprint(model_folder),
        "data": dataset_fingerprint(data_folder),
        "template": sha256_of_json(template_in_use(settings.recipe.chat_template, model_folder)),
    }
    clip = settings.dualspeed.relevance_clip
    if clip is not None and settings.dualspeed.pruner in TEXT_PRUNERS:
        inputs["relevance_clip"] = checkpoint_fingerprint(Path(clip))
    if launcher := launcher_settings(settings.recipe.training_arguments):
        inputs["launcher"] = sha256_of_json(launcher)
    return inputs


def launcher_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """Settings of accelerate's and DeepSpeed's files that decide the result; empty for the files that ship.

    Args:
        arguments: the recipe's training arguments, which take precedence over the launcher's precision.
    """
    found: dict[str, Any] = {name: os.environ.get(name, "no").lower() for name in LAUNCHER}
    if arguments.get("bf16") or arguments.get("fp16"):
        del found["ACCELERATE_MIXED_PRECISION"]
    found = {name: value for name, value in found.items() if value not in ("", "no", "none", "auto", "false", "0")}
    file = os.environ.get(DEEPSPEED_FILE, "none")
    if file not in ("", "none"):
        deepspeed = read_deepspeed(Path(file))
        found |= _decided({key: value for key, value in deepspeed.items() if key not in SHARES})
    return found


def _decided(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are left to the training arguments, `auto`."""
    found = {key: _decided(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: value for key, value in found.items() if value not in ("auto", {})}

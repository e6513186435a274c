"""The names, types and choices of `transformers.TrainingArguments`, read from its source.

Importing the class loads torch, which takes seconds; a workflow that has nothing to do should answer faster than that.
"""

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.reading import check_choice, check_range, did_you_mean, exponent_hint, is_instance

# What a recipe may not set, and where it is set instead.
RESERVED = {
    "per_device_train_batch_size": "global_batch_size (and per_device_batch_size) of the recipe",
    "gradient_accumulation_steps": "global_batch_size (and per_device_batch_size) of the recipe",
    "auto_find_batch_size": "global_batch_size (and per_device_batch_size) of the recipe",
    "eval_strategy": "validation_annotations and validation_steps of the recipe",
    "eval_steps": "validation_steps of the recipe",
    "load_best_model_at_end": "a stage ends with its last step's weights",
    "seed": "column seed of the sheet of experiments",
    "data_seed": "column seed of the sheet of experiments",
    "output_dir": "the workflow",
    "resume_from_checkpoint": "the workflow",
    "save_only_model": "a stage resumes from whole checkpoints, to the weights of an uninterrupted one",
    "ignore_data_skip": "a stage resumes at its next sample, to the weights of an uninterrupted one",
    "remove_unused_columns": "the workflow",
    "report_to": "the block tracking",
    "run_name": "the block tracking",
    "enable_jit_checkpoint": "a stage stops on SIGTERM with a checkpoint of its own",
}
# key -> (smallest valid value, words)
MINIMUM = {"learning_rate": 0, "weight_decay": 0, "warmup_steps": 0, "logging_steps": 0, "save_steps": 0}
TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict, "None": type(None)}


def check_training_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError at the first name that TrainingArguments lacks, or value of another type or out of range."""
    for name, value in arguments.items():
        key = f"training_arguments.{name}"
        if name in RESERVED:
            raise ConfigError(f"{key}: not set here; valid: {RESERVED[name]}")
        check_argument(key, name, value)


def check_argument(key: str, name: str, value: Any) -> None:
    """Raise ConfigError if TrainingArguments has no such field, or not of this type or range; `key` is for messages."""
    known = training_argument_types()
    if name not in known:
        hint = did_you_mean(name, set(known) - set(RESERVED))
        raise ConfigError(f"{key}: unknown key{hint}; valid: the fields of transformers.TrainingArguments")
    valid_types, choices = known[name]
    if not is_instance(value, valid_types):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in valid_types)
        found = f"{value!r} is of type {type(value).__name__}"
        raise ConfigError(f"{key}: {found}; valid: {names}{exponent_hint(value)}")
    if choices:
        check_choice(key, value, choices)
    if name in MINIMUM:
        check_range(key, value, value >= MINIMUM[name], f"{MINIMUM[name]} or more")
    if name in ("adam_beta1", "adam_beta2"):
        check_range(key, value, 0 <= value < 1, "in [0, 1)")


@cache
def training_argument_types() -> dict[str, tuple[tuple[type, ...], tuple[str, ...]]]:
    """name -> (types a YAML value may have, valid strings or () for any), from the installed transformers."""
    spec = importlib.util.find_spec("transformers")
    assert spec and spec.origin, "transformers is installed: the core needs it"
    folder = Path(spec.origin).parent
    source = ast.parse((folder / "training_args.py").read_text(encoding="utf-8"))
    helpers = ast.parse((folder / "trainer_utils.py").read_text(encoding="utf-8"))
    classes = {node.name: node for tree in (source, helpers) for node in tree.body if isinstance(node, ast.ClassDef)}
    return {
        field.target.id: _read_annotation(field.annotation, classes)
        for field in classes["TrainingArguments"].body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and not field.target.id.startswith("_")
    }


def _read_annotation(annotation: ast.expr, classes: dict[str, ast.ClassDef]) -> tuple[tuple[type, ...], tuple]:
    """`float | None` -> ((float, NoneType), ()); `SchedulerType | str` -> ((str,), the scheduler's names)."""
    if isinstance(annotation, ast.BinOp):
        left, right = _read_annotation(annotation.left, classes), _read_annotation(annotation.right, classes)
        return left[0] + right[0], left[1] + right[1]
    name = ast.unparse(annotation).partition("[")[0]
    if name in TYPES:
        return (TYPES[name],), ()
    if name in classes:
        values = [node.value for node in classes[name].body if isinstance(node, ast.Assign)]
        return (), tuple(value.value for value in values if isinstance(value, ast.Constant))
    return (object,), ()

"""Options of `dualspeed finetune`: fields of DualSpeedConfig, LoraRecipe and TrainingArguments, from options and YAML.

Names, types and values are read and checked without torch, so that `--help` and a mistyped name are answered at once.
"""

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.attention import ATTENTION, check_reads_lengths
from dualspeed.settings.fields import check_fields, choice, number
from dualspeed.settings.identity import DECIDES_NOTHING, record
from dualspeed.settings.method import DualSpeedConfig, check_slow_steps
from dualspeed.settings.reading import did_you_mean, quote, read_dataclass
from dualspeed.settings.recipe import LoraRecipe
from dualspeed.settings.schema import field_docstrings
from dualspeed.settings.stage import check_cache
from dualspeed.settings.training_arguments import check_argument, training_argument_types
from dualspeed.settings.yaml_file import read_yaml

LORA = "lora_"
"""Start of the names of LoraRecipe's options."""
SET_ELSEWHERE = {"output_dir", "resume_from_checkpoint", "remove_unused_columns", "do_train", "do_eval", "do_predict"}
SET_ELSEWHERE |= {"local_rank", "label_names", "parallelism_config"}
"""Fields of TrainingArguments that the command sets, or that have no effect on it or no form as an option."""
HARMLESS = (
    *("logging_", "log_", "report_to", "run_name", "project", "disable_tqdm", "save_", "hub_", "push_to_hub"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "trackio"),
)
"""Starts of the names of training arguments that a run may be resumed with other values of."""

READERS: dict[type, Callable[[str], Any]] = {int: int, float: float, dict: json.loads}
"""Type -> function that makes a value of it of a text."""


@dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """Model, data and folder of a finetuning, and how rows and steps are made of them."""

    model: str
    """Name of a VLM on the Hub, or folder of its checkpoint."""
    data: str
    """Name of a dataset on the Hub; or JSON, JSON lines, parquet, a folder of parquet, a dataset by save_to_disk."""
    output_dir: str
    """Folder of checkpoints and of the finished model; run again with the same folder, the training resumes."""
    data_config: str | None = None
    """Configuration of the Hub's dataset."""
    split: str | None = None
    """Split of the dataset; null: train."""
    eval_split: str | None = None
    """Split to evaluate on, when `eval_strategy` says."""
    images: str | None = None
    """Folder that image paths of JSON files start from."""
    max_length: int | None = number(above=0, default=None)
    """Longest row in tokens; null: no limit."""
    projector_learning_rate: float | None = number(minimum=0, default=None)
    """Learning rate of projector and isolator; null: learning_rate."""
    vision_learning_rate: float | None = number(minimum=0, default=None)
    """Learning rate of the vision tower; null: it is frozen."""
    slow_batch_size: int | None = number(above=0, default=None)
    """Samples of a micro-batch of a slow step on each device; null: as in fast steps."""
    tokens_per_batch: int | None = number(above=0, default=None)
    """Most tokens of a micro-batch, padding included, after pruning in fast steps; null: whole batches of samples."""
    slow_tokens_per_batch: int | None = number(above=0, default=None)
    """The same in slow steps; null: tokens_per_batch."""
    cache_features: str | None = field(default=None, metadata=DECIDES_NOTHING)
    """Folder that keeps what the frozen vision tower makes of each image; null: the tower runs in every step."""
    attn_implementation: str | None = choice(ATTENTION, default=None)
    """Implementation of the language model's attention, in transformers' names; null: its choice."""
    packing: bool = False
    """Join the rows of a micro-batch behind one another, without padding; needs flash or flex attention."""
    lora: bool = False
    """Train adapters instead of the whole language model; any lora_ option asks for them too."""
    compare: bool = field(default=False, metadata=DECIDES_NOTHING)
    """Afterwards, time steps on full tokens on the same batches."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.cache_features is not None and self.vision_learning_rate is not None:
            raise ConfigError("cache_features: the vision tower is trained by vision_learning_rate; valid: one of both")
        if self.packing:
            check_reads_lengths(self.attn_implementation)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Everything that `dualspeed finetune` is told."""

    run: FinetuneRun
    dualspeed: DualSpeedConfig
    lora: LoraRecipe | None
    training_arguments: dict[str, Any]
    """Given fields of TrainingArguments."""

    def flat(self) -> dict[str, Any]:
        """Name of each option that decides the result -> value; of TrainingArguments, those that were given."""
        lora = {} if self.lora is None else {LORA + name: value for name, value in record(self.lora).items()}
        run = {name: value for name, value in record(self.run).items() if name not in ("output_dir", "lora")}
        given = {name: value for name, value in self.training_arguments.items() if not name.startswith(HARMLESS)}
        return run | record(self.dualspeed) | lora | given


@dataclass(frozen=True)
class Option:
    """One option, by the field that it sets."""

    group: type | None
    """Dataclass of the field; None: TrainingArguments."""
    types: tuple[type, ...]
    """Types that a value may have."""
    help: str


@cache
def known_options() -> dict[str, Option]:
    """Name of each option, as YAML has it -> the option."""
    found: dict[str, Option] = {}
    for group, start in ((FinetuneRun, ""), (DualSpeedConfig, ""), (LoraRecipe, LORA)):
        texts, hints = field_docstrings(group), typing.get_type_hints(group)
        for each in dataclasses.fields(group):
            default = "" if each.default in (dataclasses.MISSING, None, False) else f" Default: {each.default}."
            found[start + each.name] = Option(group, types_of(hints[each.name]), texts[each.name] + default)
    for name, (kinds, choices) in training_argument_types().items():
        if name not in SET_ELSEWHERE:
            found[name] = Option(None, kinds, f"One of {', '.join(choices)}." if choices else "")
    return found


def types_of(hint: Any) -> tuple[type, ...]:
    """(int, NoneType) of `int | None`."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


class Parser(argparse.ArgumentParser):
    """Parser whose errors are ConfigErrors: one sentence."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise the error."""
        raise ConfigError(f"{message}; valid: see dualspeed finetune --help")


class Once(argparse.Action):
    """Stores a value; an option that is there twice is an error."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store."""
        if hasattr(namespace, self.dest):
            raise ConfigError(f"{option_string}: given twice; valid: once")
        setattr(namespace, self.dest, values)


def make_parser() -> Parser:
    """Parser of the command's own options, and of all fields'; absent ones are not in the result."""
    parser = Parser(
        prog="dualspeed finetune",
        usage="dualspeed finetune --model M --data D --output-dir O [options, or --config YAML]",
        description="Train a VLM on your data in fast and slow steps. Run again, it resumes.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=Once, metavar="YAML", help="File of options; those given here come first.")
    titles: dict[type | None, str] = {
        FinetuneRun: "what and where",
        DualSpeedConfig: "method",
        LoraRecipe: "adapters (LoRA)",
    }
    titles[None] = "transformers.TrainingArguments"
    groups = {group: parser.add_argument_group(title) for group, title in titles.items()}
    for name, option in known_options().items():
        groups[option.group].add_argument(
            *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
            action=Once,
            nargs="?" if bool in option.types else "+" if list in option.types else None,
            const="true",
            metavar="|".join(kind.__name__ for kind in option.types if kind is not types.NoneType),
            help=option.help.replace("%", "%%"),
        )
    return parser


def read_options(arguments: Sequence[str]) -> FinetuneSettings:
    """Settings that the arguments of the command give, with those of the YAML file that `--config` names.

    Raises:
        ConfigError: an unknown, repeated, missing or invalid option or key.
    """
    given, rest = make_parser().parse_known_args(arguments)
    options = vars(given)
    if rest:
        hint = did_you_mean(rest[0].removeprefix("--").replace("-", "_"), known_options())
        raise ConfigError(f"{rest[0]}: unknown option{hint}; valid: see dualspeed finetune --help")
    file = options.pop("config", None)
    values = {} if file is None else read_file(Path(file))
    values |= {name: from_text(name, text) for name, text in options.items()}
    return settings_of(values, "options" if file is None else f"options and {file}")


def read_file(file: Path) -> dict[str, Any]:
    """Options of a YAML file."""
    values = read_yaml(file)
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: {quote(values)}; valid: a mapping of options, such as `learning_rate: 1.0e-5`")
    for name in values:
        if name not in known_options():
            hint = did_you_mean(name, known_options())
            raise ConfigError(f"{file}: {name}: unknown key{hint}; valid: the options of dualspeed finetune --help")
    return values


def from_text(name: str, text: str | list[str]) -> Any:
    """Value of an option, of the first of its types that the text is one of; ConfigError if it is of none."""
    kinds = known_options()[name].types
    if isinstance(text, list):
        return text if len(text) > 1 else from_text(name, text[0])
    if types.NoneType in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind, read in READERS.items():
        try:
            value = read(text) if kind in kinds else None
        except ValueError:
            continue
        if isinstance(value, kind):
            return value
    if str in kinds or object in kinds:
        return text
    if list in kinds:
        return [text]
    valid = " or ".join(kind.__name__ for kind in kinds if kind is not types.NoneType)
    raise ConfigError(f"--{name}: {quote(text)}; valid: {valid}")


def settings_of(values: dict[str, Any], source: str) -> FinetuneSettings:
    """Settings of checked values; `source` names them in errors."""
    of_group: dict[type | None, dict[str, Any]] = {FinetuneRun: {}, DualSpeedConfig: {}, LoraRecipe: {}, None: {}}
    for name, value in values.items():
        group = known_options()[name].group
        of_group[group][name.removeprefix(LORA) if group is LoraRecipe else name] = value
    for name, value in of_group[None].items():
        check_argument(f"{source}: {name}", name, value)
    run = read_dataclass(FinetuneRun, of_group[FinetuneRun], source)
    check_slow_steps(of_group[DualSpeedConfig])
    dualspeed = read_dataclass(DualSpeedConfig, of_group[DualSpeedConfig], source)
    check_cache(run.cache_features, dualspeed)
    has_lora = run.lora or bool(of_group[LoraRecipe])
    return FinetuneSettings(
        run=run,
        dualspeed=dualspeed,
        lora=read_dataclass(LoraRecipe, of_group[LoraRecipe], source, LORA.strip("_")) if has_lora else None,
        training_arguments=of_group[None],
    )

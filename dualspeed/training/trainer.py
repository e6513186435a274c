"""DualSpeedTrainer: a `transformers.Trainer` that chooses the mode of each step and saves stock checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments

from dualspeed.data.collator import ConversationCollator
from dualspeed.data.dataset import Reading, read_conversations
from dualspeed.data.supervision import Supervision
from dualspeed.errors import ConfigError
from dualspeed.method.checkpoint import load_vlm
from dualspeed.method.model import DualSpeedModel
from dualspeed.training.mixin import DualSpeedMixin
from dualspeed.training.token_batches import check_longest
from dualspeed.training.trainable import hold_trained_weights_in_float32

DROPPED_ROWS = "dropped_rows_{}.jsonl"
"""File in `args.output_dir` that lists the rows of a dataset that can't be used, with the reason of each."""


class DualSpeedTrainer(DualSpeedMixin, Trainer):
    """Trains a VLM in fast and slow steps; takes the place of `Trainer`, with a `DualSpeedConfig` as well.

    Example:
        >>> trainer = DualSpeedTrainer(
        ...     model="Qwen/Qwen3-VL-2B-Instruct",
        ...     args=TrainingArguments("out", learning_rate=1e-5, bf16=True),
        ...     train_dataset=load_dataset("HuggingFaceM4/the_cauldron", "ai2d", split="train"),
        ...     dualspeed=DualSpeedConfig(pruning_ratio=0.9),
        ... )
        >>> trainer.train()
        >>> trainer.save_model("out/final")
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | DualSpeedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *others: Any,
        max_length: int | None = None,
        to_messages: Callable[[Any], Any] | None = None,
        max_dropped_share: float = 0.05,
        **named: Any,
    ) -> None:
        """Set up training.

        Args:
            model: a stock VLM, a DualSpeedModel, or the name on the Hub or folder of a checkpoint. A checkpoint's
                trained weights are held in float32, its frozen ones in their own dtype under mixed precision.
            data_collator: collator of the datasets' rows; None: a ConversationCollator, for the rows of docs/data.md.
            processing_class: processor of the model; None: the one that is saved with the model.
            max_length: longest row in tokens, for the default collator, which cuts longer ones. None: no limit.
            to_messages: function that makes of a row one in a format of docs/data.md. None: rows are such.
            max_dropped_share: largest share of unusable rows, which are counted and listed (DROPPED_ROWS).
            others, named: the further arguments of `transformers.Trainer`, and those of DualSpeedMixin: `dualspeed`,
                `projector_learning_rate`, `vision_learning_rate`, `slow_batch_size`, `tokens_per_batch`,
                `slow_tokens_per_batch`, `packing`, `eval_mode` and `cache_features`.
        """
        args = TrainingArguments("tmp_trainer") if args is None else args
        name = model if isinstance(model, str | Path) else None
        source = name or getattr(getattr(model, "config", None), "_name_or_path", None)
        has_data = train_dataset is not None or eval_dataset is not None
        reads_rows = data_collator is None and (has_data or processing_class is not None or name is not None)
        if data_collator is not None and (max_length is not None or to_messages is not None):
            raise ConfigError("max_length and to_messages: have no effect on rows that `data_collator` reads")
        if reads_rows:
            processing_class = checked_processor(processing_class, source)
            reading = {"to_messages": to_messages, "max_dropped_share": max_dropped_share}
            train_dataset = read_dataset(train_dataset, "train", args, processing_class, **reading)
            eval_dataset = read_dataset(eval_dataset, "eval", args, processing_class, **reading)
        super().__init__(
            model if name is None else load_for_training(name, args),
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            *others,
            **named,
        )
        if name is not None and not self.is_deepspeed_enabled:
            hold_trained_weights_in_float32(self.model)
        if reads_rows:
            self.data_collator = self._default_collator(processing_class, max_length)

    def _default_collator(self, processor: ProcessorMixin, max_length: int | None) -> ConversationCollator:
        """Collator that gives what model and settings need."""
        if self.token_budgets is not None:
            check_longest(self.token_budgets, max_length)
        return ConversationCollator(
            processor,
            max_length,
            with_num_images=self.slow_batch_size is not None or self.token_budgets is not None,
            question_tokenizer=self.model.question_tokenizer(processor),
            positions=self.model.positions(),
        )


def load_for_training(name: str | Path, args: TrainingArguments, **loading: Any) -> PreTrainedModel:
    """Load a stock model in its own dtype for mixed precision, else in float32; `loading` is for `from_pretrained`."""
    return load_vlm(name, **({} if args.bf16 or args.fp16 else {"dtype": "float32"}) | loading)


def read_dataset(dataset: Any, name: str, args: TrainingArguments, processor: ProcessorMixin, **reading: Any) -> Any:
    """Dataset of the conversations in a dataset of rows, `train` or `eval`; unusable rows are listed in a file."""
    file = Path(args.output_dir) / DROPPED_ROWS.format(name)
    read = Reading(f"{name}_dataset", file, supervision=Supervision.of(processor), **reading)
    return read_conversations(dataset, read, args.main_process_first)


def checked_processor(given: Any, source: str | Path | None) -> ProcessorMixin:
    """Processor for the default collator: the given one, or else the one that is saved with the model.

    Args:
        source: folder of the model, or its name on the Hub; None: not known.
    """
    try:
        processor = AutoProcessor.from_pretrained(source) if given is None and source else given
    except Exception as error:  # transformers raises a dozen kinds for what isn't there
        raise ConfigError(
            f"processing_class: {source} has no processor ({str(error).strip().splitlines()[0]}); valid: a processor, "
            "or a data_collator that needs none"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        found = "the model names no checkpoint" if processor is None else f"{type(processor).__name__} is none of both"
        raise ConfigError(f"processing_class: {found}; valid: a processor of images and text, or a data_collator")
    return processor

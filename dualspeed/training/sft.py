"""DualSpeedSFTTrainer: TRL's SFTTrainer, which chooses the mode of each step and saves stock checkpoints.

TRL makes model, collator and datasets; then a DualSpeedModel takes the model's place. The loss is ours: TRL's own is
computed by a forward that TRL puts in the place of the model's, of full tokens alone.
"""

import inspect
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from dualspeed.errors import ConfigError
from dualspeed.method.model import DualSpeedModel
from dualspeed.method.outputs import DualSpeedOutput
from dualspeed.settings.modes import Mode
from dualspeed.training.mixin import DualSpeedMixin
from dualspeed.training.token_metrics import TokenMetrics

HIDDEN_FORWARD = "original_forward"
"""Name by which TRL's forward (trl.trainer.utils.add_fused_lm_head) holds the one whose place it takes."""


class DualSpeedSFTTrainer(DualSpeedMixin, SFTTrainer):  # type: ignore[misc]  # the mixin's base is Trainer to mypy
    """Trains a VLM in fast and slow steps; takes the place of `SFTTrainer`, with a `DualSpeedConfig` as well.

    Example:
        >>> trainer = DualSpeedSFTTrainer(
        ...     model="Qwen/Qwen2.5-VL-3B-Instruct",
        ...     args=SFTConfig("out", max_length=None, assistant_only_loss=True),
        ...     train_dataset=load_dataset("trl-lib/llava-instruct-mix", split="train"),
        ...     dualspeed=DualSpeedConfig(pruning_ratio=0.9),
        ... )
        >>> trainer.train()
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: TrainingArguments | None = None,
        *positional: Any,
        **named: Any,
    ) -> None:
        """Set up training.

        Args:
            model: a stock VLM, the name on the Hub or folder of a checkpoint, or a PeftModel with LoRA adapters.
            args: SFTConfig; packing, padding_free and `dft` don't go with pruning.
            positional, named: the further arguments of `trl.SFTTrainer`, and those of DualSpeedMixin: `dualspeed`,
                `projector_learning_rate`, `vision_learning_rate`, `slow_batch_size`, `tokens_per_batch`,
                `slow_tokens_per_batch`, `packing`, `eval_mode` and `cache_features`.
        """
        if isinstance(model, DualSpeedModel):
            raise ConfigError("model: TRL reads what a DualSpeedModel lacks; valid: its stock model (model.vlm)")
        name = str(model) if isinstance(model, str | Path) else model.config._name_or_path
        args = sft_arguments(args, f"{Path(name).name}-SFT")
        check_sft_arguments(args)
        self._token_metrics = {"train": TokenMetrics(), "eval": TokenMetrics()}
        super().__init__(name if isinstance(model, str | Path) else model, args, *positional, **named)
        give_back_forward(self.inner_model.vlm)
        if self.aux_loss_enabled:
            raise ConfigError(
                f"router_aux_loss_coef: {self.router_aux_loss_coef}, but steps on pruned tokens have no loss of the "
                "experts' balance; valid: SFTConfig(router_aux_loss_coef=0.0)"
            )
        divided = {"slow_batch_size": self.slow_batch_size, "tokens_per_batch": self.token_budgets}
        check_collator(self.data_collator, self.inner_model, divided)

    def note_outputs(self, inputs: dict[str, Any], outputs: DualSpeedOutput) -> None:
        """Note the predictions of a micro-batch for TRL's metrics."""
        self._token_metrics["train" if self.model.training else "eval"].add(inputs, outputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with TRL's metrics: entropy, mean_token_accuracy and num_tokens; of fast mode's evaluation by its name.

        In fast mode the metrics are those of the predictions on pruned tokens. `num_tokens` goes on where a resumed
        training's last record ended.
        """
        mode = "train" if self.model.training else "eval"
        metrics, num_tokens = self._token_metrics[mode].take(self.accelerator)
        if metrics:
            if mode == "train":
                before = [record["num_tokens"] for record in self.state.log_history if "num_tokens" in record]
                self._total_train_tokens = max([self._total_train_tokens, *before]) + num_tokens
            metrics["num_tokens"] = [self._total_train_tokens]
            prefix = "fast_" if mode == "eval" and self._evaluated_mode is Mode.FAST else ""
            self._metrics[mode].update({prefix + name: values for name, values in metrics.items()})
        super().log(logs, start_time)


def sft_arguments(args: TrainingArguments | None, folder: str) -> SFTConfig:
    """Arguments as TRL makes them of what it is given: an SFTConfig, TrainingArguments or None."""
    if isinstance(args, SFTConfig):
        return args
    return SFTConfig(folder) if args is None else SFTConfig(**args.to_dict() | {"hub_token": args.hub_token})


def check_sft_arguments(args: SFTConfig) -> None:
    """Raise ConfigError for what TRL offers and steps on pruned tokens can't do."""
    if args.packing or args.eval_packing or args.padding_free:
        name = "padding_free" if args.padding_free else "packing" if args.packing else "eval_packing"
        raise ConfigError(f"{name}: pruning needs each sample in a row of its own; valid: False")
    if args.loss_type != "nll":
        raise ConfigError(f"loss_type: {args.loss_type!r}, but slow steps learn from fast mode by nll; valid: 'nll'")
    if args.activation_offloading:
        raise ConfigError("activation_offloading: TRL's hooks are on a model that isn't called; valid: False")
    if (args.gradient_checkpointing_kwargs or {}).get("selective"):
        raise ConfigError("gradient_checkpointing_kwargs: 'selective' needs TRL's own switch; valid: without it")


def check_collator(collator: Any, model: DualSpeedModel, divided: dict[str, Any]) -> None:
    """Raise ConfigError if TRL's collator lacks what the settings need in each batch.

    Args:
        divided: arguments that divide batches, by name; None: not given.
    """
    if not isinstance(collator, DataCollatorForVisionLanguageModeling):
        return
    needed = {f"pruner {model.dualspeed.pruner!r}": model.question_tokenizer(collator.processor) is not None}
    needed |= {name: value is not None for name, value in divided.items()}
    for name, is_needed in needed.items():
        if is_needed:
            raise ConfigError(
                f"{name}: needs more in each batch than TRL's collator gives; valid: data_collator="
                "ConversationCollator(processor, with_num_images=True, question_tokenizer=...)"
            )


def give_back_forward(vlm: PreTrainedModel) -> None:
    """Put the model's own forward back in its place, which TRL's took."""
    forward = vars(vlm).pop("forward")
    hidden = inspect.getclosurevars(forward.__func__).nonlocals[HIDDEN_FORWARD]
    if getattr(hidden, "__func__", None) is not type(vlm).forward:
        vlm.forward = hidden  # an instance's own, such as that of accelerate's hooks

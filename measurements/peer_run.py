"""One training of `measurements.peers`, in this process or in those that torch.distributed.run started.

    python -m measurements.peer_run FOLDER

Reads FOLDER/settings.json and writes FOLDER/rank<R>.json: the seconds of each step behind the warm-up by its mode, with
the loading of its data; first loss, peak memory, tokens; or the sentence with which the trainer was refused.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dualspeed import DualSpeedConfig
from dualspeed.cluster.launch import one_of_several
from dualspeed.data.collator import ConversationCollator
from dualspeed.data.processing import load_processor
from dualspeed.device import machine, peak_memory_bytes, synchronize
from dualspeed.errors import ConfigError
from dualspeed.files import write_json
from dualspeed.settings.modes import Mode
from dualspeed.training.grouping import FULL_LENGTH, pruned_lengths
from measurements import plain_step
from measurements.peers import BATCH_SIZE, PEERS, WARM_UP, Peer

SEED = 0


@dataclass(frozen=True)
class Run:
    """Model, data and settings of a trainer."""

    peer: Peer
    vlm: PreTrainedModel
    """Stock model, its tower frozen."""
    processor: Any
    dataset: Dataset
    """Samples of the whole run, each trained once."""
    arguments: dict[str, Any]
    """Training arguments that all trainers have."""
    cache: str
    """Folder of kept features."""

    @property
    def method(self) -> DualSpeedConfig:
        """Settings of the method."""
        return DualSpeedConfig(**self.peer.method)


class StepClock(TrainerCallback):
    """Notes when each step ended: from one end to the next, a step has its data loaded, and all that a trainer does."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note the time."""
        synchronize(args.device)
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds of each step but those of the warm-up."""
        return [end - start for start, end in zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:], strict=False)]


def main(folder: Path) -> None:
    """Train, and write what was measured."""
    settings = json.loads((folder / "settings.json").read_text())
    os.chdir(settings["images"])  # the data's paths of images start there
    write_json(folder / f"rank{os.environ.get('RANK', '0')}.json", measured(settings, folder / "out"))


def measured(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Figures of a training; `refused` alone, with the reason, where the trainer can't be made."""
    peer, num_steps = PEERS[settings["peer"]], WARM_UP + settings["steps"]
    try:
        trainer = MAKERS[peer.trainer](prepared(settings, peer, num_steps, out))
    except ConfigError as error:
        return {"refused": str(error)}
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    seconds: dict[str, list[float]] = {}
    for step, value in enumerate(clock.seconds(), WARM_UP):
        seconds.setdefault(mode_of(peer, step, num_steps), []).append(value)
    return {
        "seconds": seconds,
        "loss": trainer.state.log_history[0]["loss"],
        "peak_memory_bytes": peak_memory_bytes(),
        "tokens_of_a_sample": sum(trainer.train_dataset[FULL_LENGTH]) / len(trainer.train_dataset),
        "processes": trainer.accelerator.num_processes,
        "distributed": str(trainer.accelerator.distributed_type.value),
        "threads": torch.get_num_threads(),
        "machine": f"{machine()}, torch {torch.__version__}",
    }


def mode_of(peer: Peer, step: int, num_steps: int) -> str:
    """Mode of a step, from 0; `all` in a training without fast steps."""
    if peer.reads_all_tokens:
        return "all"
    return str(DualSpeedConfig(**peer.method).mode_of_step(SEED, step, num_steps))


def prepared(settings: dict[str, Any], peer: Peer, num_steps: int, out: Path) -> Run:
    """Model, data and arguments of a run."""
    attention = {"attn_implementation": "flex_attention"} if peer.option == "packing" else {}
    vlm = AutoModelForImageTextToText.from_pretrained(settings["base"], dtype="float32", **attention)
    vlm.model.vision_tower.requires_grad_(False)
    dataset = load_from_disk(settings["data"])
    arguments = {
        "output_dir": str(out),
        "max_steps": num_steps,
        "per_device_train_batch_size": BATCH_SIZE // int(os.environ.get("WORLD_SIZE", "1")),
        "seed": SEED,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.98,
        "dataloader_num_workers": 1,
        "logging_steps": 10,
        "logging_first_step": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "use_cpu": not torch.accelerator.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Run(
        peer=peer,
        vlm=vlm,
        processor=load_processor(settings["base"], "turns"),
        dataset=dataset.select(range(min(len(dataset), num_steps * BATCH_SIZE))),
        arguments=arguments,
        cache=settings["cache"],
    )


def stock_trainer(run: Run) -> Trainer:
    """Trainer of transformers, with our collator, since it has none for conversations with images."""
    return Trainer(
        run.vlm,
        TrainingArguments(**run.arguments),
        data_collator=ConversationCollator(run.processor),
        train_dataset=run.dataset,
    )


def sft_trainer(run: Run) -> Trainer:
    """TRL's SFTTrainer with its own collator, which supervises the same tokens by the template's marks.

    It adds no token to those of the template, so that the first one has to be there.
    """
    from trl import SFTConfig, SFTTrainer

    tokenizer = run.processor.tokenizer
    if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        run.processor.chat_template = "{{ bos_token }}" + run.processor.chat_template
    return SFTTrainer(
        run.vlm,
        SFTConfig(**run.arguments, max_length=None, assistant_only_loss=True),
        train_dataset=run.dataset,
        processing_class=run.processor,
    )


def dualspeed_trainer(run: Run) -> Trainer:
    """Our trainer, with the option of the row."""
    from dualspeed.training.trainer import DualSpeedTrainer

    arguments = TrainingArguments(**run.arguments)
    return DualSpeedTrainer(
        run.vlm,
        arguments,
        data_collator=ConversationCollator(run.processor, with_num_images=run.peer.option == "tokens_per_batch"),
        train_dataset=run.dataset,
        dualspeed=run.method,
        **OPTIONS[run.peer.option](run, arguments.per_device_train_batch_size),
    )


def two_micro_batches(run: Run, num_samples: int) -> dict[str, int]:
    """Budgets that hold half of a process's samples in a step, were all as long as the longest."""
    half = -(-num_samples // 2)
    return {
        "tokens_per_batch": half * int(pruned_lengths(run.dataset, run.method).max()),
        "slow_tokens_per_batch": half * max(run.dataset[FULL_LENGTH]),
    }


OPTIONS: dict[str | None, Callable[[Run, int], dict[str, Any]]] = {
    None: lambda run, num_samples: {},
    "tokens_per_batch": two_micro_batches,
    "packing": lambda run, num_samples: {"packing": True},
    "cache_features": lambda run, num_samples: {"cache_features": run.cache},
}


class PlainModel(nn.Module):
    """VLM and isolator, whose forward is the loss of a plain step: so DDP reduces the gradients as it does for all."""

    def __init__(self, vlm: PreTrainedModel, method: DualSpeedConfig) -> None:
        from dualspeed.method.isolator import ModeIsolator

        super().__init__()
        self.vlm, self.method = vlm, method
        self.isolator = ModeIsolator(method.num_virtual_tokens, vlm.config.get_text_config().hidden_size)

    def forward(self, mode: Mode, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss."""
        loss = plain_step.fast_loss if mode is Mode.FAST else plain_step.slow_loss
        return loss(self.vlm, self.isolator, batch, self.method.pruning_ratio)


class PlainTrainer(Trainer):
    """Stock trainer of a PlainModel: its loop, AdamW and data loading, with plain steps."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a plain step in the mode of its step."""
        method = self.accelerator.unwrap_model(model).method
        return model(method.mode_of_step(SEED, self.state.global_step, self.state.max_steps), dict(inputs))


def plain_trainer(run: Run) -> Trainer:
    """Trainer of plain steps. DDP looks for unused parameters: the isolator has no gradient in a slow step."""
    set_seed(SEED)  # draws the isolator's first values, as DualSpeedTrainer does
    return PlainTrainer(
        PlainModel(run.vlm, run.method),
        TrainingArguments(**run.arguments, ddp_find_unused_parameters=True),
        data_collator=ConversationCollator(run.processor),
        train_dataset=run.dataset,
    )


MAKERS: dict[str, Callable[[Run], Trainer]] = {
    "Trainer": stock_trainer,
    "SFTTrainer": sft_trainer,
    "plain": plain_trainer,
    "DualSpeedTrainer": dualspeed_trainer,
}

if __name__ == "__main__":
    with one_of_several():
        main(Path(sys.argv[1]).resolve())

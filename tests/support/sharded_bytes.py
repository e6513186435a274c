"""Training that tests/plan/test_sharded_memory.py runs in two processes, and the bytes that each holds.

Two micro-batches a step. `held` counts each storage once, of all tensors that Python can reach between the two
micro-batches of the last step: parameters, gradients, optimizer state. `saved` counts, by mode, what autograd saved for
the backward pass when it begins.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedModel, DualSpeedTrainer
from dualspeed.cluster.launch import one_of_several
from dualspeed.method.adapters import add_adapters
from dualspeed.settings.recipe import LoraRecipe
from dualspeed.training.trainable import hold_trained_weights_in_float32, set_trainable

VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "image_size": 56, "patch_size": 7}
TEXT = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 8, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 4, "vocab_size": 1000}
IMAGE_TOKEN, NUM_VISUAL, NUM_TEXT, NUM_SUPERVISED, BATCH = 4, 64, 140, 12, 4
METHOD = DualSpeedConfig(
    pruning_ratio=0.75, num_virtual_tokens=4, slow_mode_ratio=0.5, mode_schedule="stratified", distillation_weight=0.0
)
LORA = LoraRecipe(rank=16, dropout=0.0)


def make_model():
    """A LLaVA in bfloat16 whose blocks outweigh the rest."""
    torch.manual_seed(0)
    vision = VISION | {"model_type": "clip_vision_model", "num_attention_heads": 4}
    config = LlavaConfig(vision_config=vision, text_config=TEXT | {"model_type": "llama"}, image_token_id=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).to(torch.bfloat16)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Batch of equal samples: one image, then a text whose end is supervised."""
    row = torch.full((NUM_VISUAL + NUM_TEXT,), 7)
    row[4 : 4 + NUM_VISUAL] = IMAGE_TOKEN
    labels = torch.full_like(row, -100)
    labels[-NUM_SUPERVISED:] = 7
    return {
        "input_ids": row.repeat(len(rows), 1),
        "attention_mask": torch.ones(len(rows), len(row), dtype=torch.long),
        "labels": labels.repeat(len(rows), 1),
        "pixel_values": torch.randn(len(rows), 3, 56, 56),
    }


def storages(tensors) -> dict[int, int]:
    """Address -> bytes of the tensors' storages; of a DTensor, of this rank's part."""
    found = {}
    for tensor in tensors:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if local.device.type == "cpu" and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def all_tensors() -> list[torch.Tensor]:
    """Every tensor that Python can reach."""
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


class MeasuringTrainer(DualSpeedTrainer):
    """Trainer that counts bytes."""

    def __init__(self, *args, **kwargs) -> None:
        self.held: list[int] = []
        self.saved: dict[str, int] = {}
        super().__init__(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        """Count what is held after each micro-batch, the first of the last step being what counts."""
        loss = super().training_step(*args, **kwargs)
        self.held.append(sum(storages(all_tensors()).values()))
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Count what autograd has saved at the end of the forward pass, without weights and inputs."""
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            result = super().compute_loss(model, inputs, *args, **kwargs)
        weights = [found for found in all_tensors() if isinstance(found, torch.nn.Parameter)]  # gathered ones too
        known = storages([*weights, *inputs.values()])
        mode = str(self.mode_of_step(self.state.global_step))
        self.saved[mode] = sum(size for key, size in storages(saved).items() if key not in known)
        return result


def main(out: str, kind: str) -> None:
    model = make_model()
    if kind == "lora":
        add_adapters(model, LORA)
    model = DualSpeedModel(model, METHOD)
    set_trainable(model, "finetune")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        hold_trained_weights_in_float32(model)
    trainer = MeasuringTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{out}/checkpoints",
            max_steps=4,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=2,
            bf16=True,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([{"index": index} for index in range(64)]),
        data_collator=collate,
    )
    trainer.train()
    record = {"sharding": trainer.sharding, "held": trainer.held, "saved": trainer.saved}
    record["distributed_type"] = trainer.accelerator.distributed_type.value
    Path(out, f"bytes{trainer.accelerator.process_index}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    with one_of_several():
        main(*sys.argv[1:])

"""Training with kept features that tests/training/test_stored_ranks.py runs in one process, in two with DDP or FSDP2.

Of the eight steps, each rank has some without an image. Writes losses, and how many tiles this process's tower encoded.
"""

import json
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, TrainingArguments
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from dualspeed import DualSpeedConfig, DualSpeedTrainer
from dualspeed.cluster.launch import one_of_several
from tests.support import tiny

NUM_STEPS = 8


def main(base: str, rows: str, out: str, cache: str, kind: str) -> None:
    """Train with the rows in a JSON file; `cache` may be empty."""
    tiles = []
    run = CLIPEncoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        tiles.append(len(hidden_states))
        return run(self, hidden_states, *args, **kwargs)

    CLIPEncoderLayer.forward = forward
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    fsdp["fsdp_config"]["transformer_layer_cls_to_wrap"].append("CLIPEncoderLayer")
    read = json.loads(Path(rows).read_text())
    trainer = DualSpeedTrainer(
        tiny.frozen_tower(AutoModelForImageTextToText.from_pretrained(base)),
        TrainingArguments(
            out,
            max_steps=NUM_STEPS,
            per_device_train_batch_size=4 if kind == "single" else 2,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.01,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            **(fsdp if kind == "fsdp" else {}),
        ),
        dualspeed=DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7),
        train_dataset=read,
        eval_dataset=read[:3],
        processing_class=tiny.llava_processor(),
        cache_features=cache or None,
    )
    trainer.train()
    trainer.evaluate()
    record = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tiles": sum(tiles),
        "distributed_type": trainer.accelerator.distributed_type.value,
        "sharded": any(isinstance(p, DTensor) for p in trainer.inner_model.vlm.model.vision_tower.parameters()),
    }
    Path(out, f"record-{trainer.args.process_index}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    with one_of_several():
        main(*sys.argv[1:])

"""Three steps from PIL images and messages with the real processors of families whose processors need torchvision."""

import pytest
import torch
from transformers import TrainingArguments

from dualspeed import DualSpeedConfig, DualSpeedTrainer

torchvision = pytest.importorskip("torchvision")

from tests.support.noise import noise_image  # noqa: E402
from tests.support.real_processors import NAMES, parts  # noqa: E402

pytestmark = pytest.mark.torchvision
SIZES = [(30, 62), (60, 21), (28, 28), (90, 40)]


def rows() -> list[dict]:
    """Conversations with one image, two of other sizes, and none."""
    made = []
    for number, (size, count) in enumerate(zip(SIZES, [1, 2, 0, 1], strict=True)):
        question = [*[{"type": "image"}] * count, {"type": "text", "text": f"What is in picture {number}?"}]
        answer = [{"type": "text", "text": f"a thing of number {number}"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        images = [noise_image(size, seed=10 * number + place) for place in range(count)]
        made.append({"messages": messages, "images": images})
    return made


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_with_the_real_processor(name, tmp_path):
    model, processor = parts(name)
    assert "video_processor" not in type(processor).get_attributes() or processor.video_processor is not None
    trainer = DualSpeedTrainer(
        model=model,
        processing_class=processor,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=rows(),
        dualspeed=DualSpeedConfig(pruning_ratio=0.75, slow_mode_ratio=0.0),
    )
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    image_token = model.config.image_token_id
    assert (batch["input_ids"] == image_token).sum(dim=1).tolist()[2] == 0
    assert (batch["input_ids"] == image_token).sum() > 0
    assert torch.isfinite(batch["pixel_values"]).all()
    trainer.train()
    losses = [entry["fast/ce_loss"] for entry in trainer.state.log_history if "fast/ce_loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
